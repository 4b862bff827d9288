#!/bin/bash
# One run on this machine: as many ranks as MPI finds cores, or RANKS of them.
#   mpi_jobs/mpirun.sh 95 --exp mfxl1033223 [any option of "xfel-classify run"]
#   RANKS=8 mpi_jobs/mpirun.sh run/*.h5 -o out
# psana2 keeps two of the ranks for itself (it reads the index and builds events there).
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${RANKS:-}" ]; then
    # may be more than there are cores: psana2's own two ranks have little to do
    export OMPI_MCA_rmaps_base_oversubscribe=1
fi
exec mpirun ${RANKS:+-n "$RANKS"} xfel-classify run "$@"

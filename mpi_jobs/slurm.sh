#!/bin/bash
# One run; submit the same line again and it does only what is missing.
#   sbatch --account=ACCOUNT --partition=PARTITION mpi_jobs/slurm.sh 95 --exp mfxl1033223 -o OUT
# Anything after the script's name goes to "xfel-classify run". More ranks: sbatch --ntasks=120.
#SBATCH --job-name=xfel-classify
#SBATCH --nodes=1
#SBATCH --ntasks=64
#SBATCH --cpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --output=xfel-classify-%j.log
# two minutes before the time limit: flush and end with 130, so that --resume can continue
#SBATCH --signal=B:TERM@120
set -euo pipefail
export OMP_NUM_THREADS=1
case " $* " in
    *" --resume "* | *" --overwrite "* | *" --dry-run "*) ;;
    *) set -- "$@" --resume ;;
esac
# mpirun kills its ranks one second after SIGTERM, too soon to flush; SIGUSR1 it passes on to all
job=
trap '[ -z "$job" ] || kill -USR1 "$job" || true' TERM INT
mpirun -n "${SLURM_NTASKS:-64}" xfel-classify run "$@" &
job=$!
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do    # a signal ends the wait, not the job
    code=0
    wait "$job" || code=$?
done
exit "$code"

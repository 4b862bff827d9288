#!/bin/bash
# For the workflow page of the eLog (automatic run processing): it sets EXPERIMENT and RUN_NUM and
# wants an answer within 30 seconds, so this only submits. Parameters given there are passed on.
# Account and partition: SBATCH_ACCOUNT and SBATCH_PARTITION, which sbatch reads by itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out="${XFEL_CLASSIFY_OUT:-.}/${EXPERIMENT}_r$(printf '%04d' "$RUN_NUM")"
exec sbatch "$here/slurm.sh" "$RUN_NUM" --exp "$EXPERIMENT" -o "$out" "$@"

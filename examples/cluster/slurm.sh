#!/bin/bash
# A memory in sixteen parts, each a job of an array, and one job that joins them when all are done:
#   sbatch --array=1-16 examples/cluster/slurm.sh MODEL CORPUS FOLDER
#   sbatch --dependency=afterok:JOB examples/cluster/slurm.sh join FOLDER law.memory
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}  # the same in every part, or the keys differ
if [ "$1" = join ]; then
  exec nearest join "$2"/part-* --out "$3"
fi
# Started again after a kill, a part goes on from what is on its disk.
exec nearest build "$1" "$2" --out "$3/part-$SLURM_ARRAY_TASK_ID" \
  --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX"

#!/usr/bin/env bash
# Becomes the command given, with the place in the run that srun or mpirun gave this process in torch's variables:
#
#   srun launch/rank.sh python -m engine train --config RECIPE
#
# launch/slurm.sbatch and launch/mpi.sh set MASTER_ADDR and MASTER_PORT.
set -euo pipefail
if [[ -n "${OMPI_COMM_WORLD_RANK:-}" ]]; then
    export RANK="$OMPI_COMM_WORLD_RANK" LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK"
    export WORLD_SIZE="$OMPI_COMM_WORLD_SIZE" LOCAL_WORLD_SIZE="$OMPI_COMM_WORLD_LOCAL_SIZE"
elif [[ -n "${SLURM_STEP_NUM_TASKS:-}" ]]; then
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_STEP_NUM_TASKS"
    export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[^0-9]*}"
else
    echo "error: neither srun nor mpirun started this" >&2
    exit 2
fi
exec "$@"

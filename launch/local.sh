#!/usr/bin/env bash
# Runs a command of the engine on this machine, with the deepspeed launcher.
#
#   bash launch/local.sh train launch/recipes/qwen3-0.6b-from-8b.yaml --max_steps 20
#
# Commands: train, check, evaluate. Variables:
#   RANKS         ranks to start (default: one per GPU; two without a GPU)
#   MASTER_PORT   default: a free one, so that two runs can share the machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/cluster.sh
read_command "$@"

ranks="${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}"
exec deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-$(free_port)}" --module engine "${words[@]}"

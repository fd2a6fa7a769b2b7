#!/usr/bin/env bash
# Distils SmolLM2-135M-Instruct into 10 of its 30 layers: two ranks under ZeRO-3, no GPU and no model hub needed.
# Arguments go to the training command, e.g. `bash launch/quickstart.sh --max_steps 20`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
enter_venv quickstart

export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
recipe=launch/recipes/quickstart.yaml
python launch/prepare_quickstart.py --work runs/quickstart --cache .cache

# One rank per GPU up to two; without a GPU the launcher starts as many CPU ranks as it is asked for.
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
ranks=2
[[ "$gpus" == 1 ]] && ranks=1
[[ "$gpus" != 0 ]] || export DS_ACCELERATOR=cpu  # which DeepSpeed would find out, and say, in every process
# The launcher's fixed port may be taken by another run on this machine.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
# A second run trains anew, and what the first one left in the run folder makes way, unless it is to go on.
[[ "$*" == *--resume_from_checkpoint* ]] || set -- --overwrite_output_dir "$@"
echo "== training on $ranks ranks"
# The launcher's own words are errors alone; what libraries print is in the run folder, logs/rank_<k>.log.
deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --module engine train --config "$recipe" "$@"

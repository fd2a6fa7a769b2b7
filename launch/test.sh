#!/usr/bin/env bash
# Sets up .venv and runs lint, type check and all tests of a machine without a GPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
source launch/system.sh
enter_venv test
install_system_packages

export OMP_NUM_THREADS=1 WANDB_MODE=offline HF_HUB_OFFLINE=1
# DeepSpeed compiles into this folder; a build that was killed leaves a lock there, so no two runs share it.
TORCH_EXTENSIONS_DIR="$(mktemp -d)"
export TORCH_EXTENSIONS_DIR
trap 'rm -rf "$TORCH_EXTENSIONS_DIR"' EXIT

ruff check .
ruff format --check .
mypy
python -m pytest -m "not slow and not gpu" "$@"

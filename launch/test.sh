#!/usr/bin/env bash
# Sets up .venv and runs lint, type check and tests of a machine without a GPU. Other arguments go to pytest.
#
#   launch/test.sh [--quick | --slow] [pytest's words]
#
#   --quick   the unit tests but those marked lengthy
#   --slow    all; without either, all but those marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
source launch/system.sh

tests=(-m "not slow and not gpu")
case "${1:-}" in
    --quick)
        tests=(-m "not lengthy and not slow and not gpu" tests/unit)
        shift
        ;;
    --slow)
        tests=(-m "not gpu")
        shift
        ;;
esac
enter_venv test
if [[ "${tests[*]}" != *tests/unit ]]; then
    install_system_packages
fi

export OMP_NUM_THREADS=1 WANDB_MODE=offline HF_HUB_OFFLINE=1
# DeepSpeed compiles into this folder; a build that was killed leaves a lock there, so no two runs share it.
TORCH_EXTENSIONS_DIR="$(mktemp -d)"
export TORCH_EXTENSIONS_DIR
trap 'rm -rf "$TORCH_EXTENSIONS_DIR"' EXIT

ruff check .
ruff format --check .
mypy
python -m pytest --durations=20 "${tests[@]}" "$@"

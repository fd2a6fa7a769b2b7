# shellcheck shell=bash
# Sourced, not run: `source launch/venv.sh` and then `enter_venv EXTRA`.
#
# Makes .venv in the repository's root, installs the engine with one extra of pyproject.toml and puts the venv first
# on PATH. A stamp per extra holds a hash of what was installed from, so that a second call installs nothing.
#
#   PYTHON            interpreter to make the venv with (default: python3)
#   TORCH_INDEX_URL   package index for torch alone, e.g. https://download.pytorch.org/whl/cpu

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
    echo "error: $*" >&2
    exit 1
}

make_venv() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || die "no '$python' on PATH: install Python 3.10 or newer, or name one with PYTHON=/path/to/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$python" -V) is too old: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "'$python' has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv), or name another with PYTHON=/path/to/python"
    echo "== making $REPO_ROOT/.venv with $("$python" -V)"
    # Built beside its place is not possible (a venv holds its own path), so a broken one is remade from scratch.
    "$python" -m venv --clear "$REPO_ROOT/.venv"
}

enter_venv() {
    local extra="$1" venv="$REPO_ROOT/.venv"
    local stamp="$venv/.installed-$extra" constraints="$REPO_ROOT/launch/constraints.txt"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    unset PYTHONHOME
    # Two OpenMP threads per rank on a shared two-core machine slow a decode step down 70 times.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

    local wanted
    wanted="$(cat "$REPO_ROOT/pyproject.toml" "$constraints" | sha256sum | cut -d' ' -f1) $REPO_ROOT"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "== installing the engine and its '$extra' extra (a few minutes the first time)"
    # torch goes first, pinned exactly: an open range may pull another build, with gigabytes of CUDA libraries.
    local torch_pin index=()
    torch_pin="$(grep -E '^torch==' "$constraints")"
    if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
        index=(--index-url "$TORCH_INDEX_URL")
    fi
    python -m pip install --quiet "${index[@]}" "$torch_pin"
    python -m pip install --quiet --editable "${REPO_ROOT}[$extra]" --constraint "$constraints"
    echo "$wanted" >"$stamp"
}

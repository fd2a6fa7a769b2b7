# shellcheck shell=bash
# Sourced by the launch scripts. All of them are called alike:
#
#   SCRIPT COMMAND RECIPE [--field value ...]      COMMAND: train, check (the cluster, before a job), evaluate
#
# and run in the repository's root, with its .venv where there is one, else with the Python on PATH.

die() {
    echo "error: $*" >&2
    exit 2
}

# Checks the words of the command line and leaves `words`, what goes after `python -m engine`.
read_command() {
    (($# >= 2)) || die "usage: $0 train|check|evaluate RECIPE [--field value ...]"
    [[ "$1" =~ ^(train|check|evaluate)$ ]] || die "$1: must be train, check or evaluate"
    [[ -f "$2" ]] || die "$2: no such recipe"
    # shellcheck disable=SC2034  # for the script that sources this file
    words=("$1" --config "$2" "${@:3}")
    if [[ -x .venv/bin/python ]]; then
        export PATH="$PWD/.venv/bin:$PATH"
    fi
    # Ranks that share cores with each other's threads crawl.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
}

# Variables that every host needs, a NAME=value on each line: the interface IFNAME for NCCL and gloo, what this shell
# has set of the names below, and the lines of ~/.deepspeed_env and ./.deepspeed_env, which win.
host_variables() {
    local name
    for name in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
        [[ -z "${IFNAME:-}" ]] || echo "$name=$IFNAME"
    done
    for name in OMP_NUM_THREADS TOKENIZERS_PARALLELISM HF_HOME HF_HUB_OFFLINE WANDB_MODE TORCH_EXTENSIONS_DIR; do
        [[ -z "${!name:-}" ]] || echo "$name=${!name}"
    done
    cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_]+=' || true
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

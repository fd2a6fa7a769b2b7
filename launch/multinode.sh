#!/usr/bin/env bash
# Runs a command of the engine on several hosts, with the deepspeed launcher over pdsh, or over plain ssh.
#
#   HOSTFILE=hosts IFNAME=eth0 bash launch/multinode.sh train launch/recipes/qwen3-1.7b-from-32b.yaml
#
# Commands: train, check, evaluate. Needs ssh without a password from here to every host, and this folder, the Python
# environment and the output folder at the same path on all of them. Variables:
#   HOSTFILE      hosts and their slots (default: launch/hostfile; see launch/hostfile.example)
#   INCLUDE       use only these, e.g. n1@n2:0,1 (all slots of n1, two of n2); or EXCLUDE, all but these
#   IFNAME        network interface of NCCL and gloo (default: their own choice, often wrong with several)
#   LAUNCHER      pdsh (default) or ssh
#   MASTER_ADDR, MASTER_PORT   where rank 0 listens (default: the first host's first address, 29500)
# .deepspeed_env, here or in the home folder, holds more variables for all hosts: a NAME=value on each line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/cluster.sh
read_command "$@"
hostfile="${HOSTFILE:-launch/hostfile}" port="${MASTER_PORT:-29500}"
[[ -f "$hostfile" ]] || die "$hostfile: no such hostfile; copy launch/hostfile.example"

# The hosts that are left, in rank order, as DeepSpeed reads its own formats.
selected="$(python - "$hostfile" "${INCLUDE:-}" "${EXCLUDE:-}" 2>/dev/null <<'PYTHON'
import sys
from deepspeed.launcher.runner import encode_world_info, fetch_hostfile, parse_inclusion_exclusion
active = parse_inclusion_exclusion(fetch_hostfile(sys.argv[1]), *sys.argv[2:])
print(encode_world_info(active), *active)
PYTHON
)" || die "$hostfile, INCLUDE=${INCLUDE:-} EXCLUDE=${EXCLUDE:-}: not a selection of hosts"
read -r world_info hosts <<<"${selected##*$'\n'}"
read -ra hosts <<<"$hosts"

# A host that dies without a word is given up after 30 s; ssh alone would wait for ever.
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3)
declare -A probes
for host in "${hosts[@]}"; do ssh "${ssh_options[@]}" "$host" true & probes[$host]=$!; done
down=()
for host in "${hosts[@]}"; do wait "${probes[$host]}" || down+=("$host"); done
((${#down[@]} == 0)) || die "no ssh to ${down[*]}: nothing was started"
address="${MASTER_ADDR:-}"
# shellcheck disable=SC2029  # IFNAME is this shell's
[[ -n "$address" ]] || address="$(ssh "${ssh_options[@]}" "${hosts[0]}" \
    "${IFNAME:+ip -4 -o address show dev $IFNAME | sed 's/.*inet //;' || }hostname -I" | grep -oE '^[0-9.]+' | head -1)"

if [[ "${LAUNCHER:-pdsh}" == pdsh ]]; then
    mkdir -p .cache
    export DS_ENV_FILE="$PWD/.cache/host_variables_$port" PDSH_SSH_ARGS_APPEND="${ssh_options[*]}"
    host_variables >"$DS_ENV_FILE"
    exec deepspeed --hostfile "$hostfile" --include "${INCLUDE:-}" --exclude "${EXCLUDE:-}" --launcher pdsh \
        --force_multi --master_addr "$address" --master_port "$port" --module engine "${words[@]}"
fi
mapfile -t variables < <(host_variables)
for node in "${!hosts[@]}"; do # -tt: when this script ends, so do the ranks
    ssh -tt "${ssh_options[@]}" "${hosts[node]}" "cd $(printf %q "$PWD") && $(printf '%q ' env "${variables[@]}" \
        "$(command -v python)" -u -m deepspeed.launcher.launch --world_info="$world_info" --node_rank="$node" \
        --master_addr="$address" --master_port="$port" --module engine "${words[@]}")" </dev/null &
    probes[${hosts[node]}]=$!
done
status=0
for host in "${hosts[@]}"; do wait "${probes[$host]}" || status=$?; done
exit "$status"

#!/usr/bin/env bash
# Runs a command of the engine on several hosts with OpenMPI's mpirun.
#
#   HOSTFILE=hosts IFNAME=eth0 bash launch/mpi.sh train launch/recipes/qwen3-1.7b-from-32b.yaml
#
# Commands: train, check, evaluate. Needs what launch/multinode.sh needs, and OpenMPI on every host. MPI only starts the
# ranks; they talk through NCCL or gloo. Variables:
#   HOSTFILE      hosts and their slots (default: launch/hostfile; see launch/hostfile.example)
#   IFNAME        network interface of NCCL, gloo and mpirun itself
#   MASTER_ADDR, MASTER_PORT   where rank 0 listens (default: the first host of the file, 29500)
#   MPI_ARGS      further flags of mpirun, e.g. --host n1:8,n2:8 in place of a hostfile
# .deepspeed_env holds more variables for all hosts, as for launch/multinode.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/cluster.sh
read_command "$@"
hostfile="${HOSTFILE:-launch/hostfile}"
[[ -f "$hostfile" ]] || die "$hostfile: no such hostfile; copy launch/hostfile.example"

first="$(grep -v '^#' "$hostfile" | awk 'NF {print $1; exit}')"
exports=(-x "MASTER_ADDR=${MASTER_ADDR:-$first}" -x "MASTER_PORT=${MASTER_PORT:-29500}" -x PATH)
while IFS= read -r line; do exports+=(-x "$line"); done < <(host_variables)
interface=()
if [[ -n "${IFNAME:-}" ]]; then
    interface=(--mca oob_tcp_if_include "$IFNAME" --mca btl_tcp_if_include "$IFNAME")
fi
# Ranks of a host are consecutive (by slot), as token groups need them; no binding, so that threads get their cores.
read -ra more <<<"${MPI_ARGS:-}"
exec mpirun --hostfile "$hostfile" --map-by slot --bind-to none "${interface[@]}" "${exports[@]}" "${more[@]}" \
    launch/rank.sh python -u -m engine "${words[@]}"

"""Hosts: how ranks meet, which rank is where, whose turn it is on a host, and who is missing when a run breaks.

Works on the rendezvous store (a TCP server in rank 0's process, or in torchrun's agent): no collective, no accelerator,
no model. Nothing here waits longer than it is told.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TypeVar

import psutil
import torch.distributed as dist

T = TypeVar("T")

FAILURE_WAIT_S = 5  # ranks of one broken collective give up within a moment of each other
POLL_S = 0.2
STORE_WAIT_S = 10  # an answer of a store whose host may be gone

_turns = count()


def host_name() -> str:
    """This host's name; Slurm's own name of the node, where it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def meet(timeout_s: int) -> dist.Store:
    """The store of this run, once every rank has come to it. Every rank that the launcher started must call.

    Raises:
        ConnectionError: where ranks stay away for `timeout_s`, or a host has no interface of the name it is to use.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, world_size, rank == 0 and not has_agent, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(
            f"rank {rank} on {host_name()} found no rank 0 at {address}:{port} within {timeout_s} s: is it running, is "
            f"that address reachable from {host_name()}, is the port free? ({str(error).splitlines()[0]})"
        ) from error
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    keys = [f"host/{r}" for r in range(world_size)]
    store.set(keys[rank], json.dumps(describe_host()))
    try:
        store.wait(keys, timeout)
    except (dist.DistError, RuntimeError) as error:
        absent = [r for r in range(world_size) if not store.check([keys[r]])]
        present = [r for r in range(world_size) if r not in absent]
        raise ConnectionError(
            f"{name_ranks(absent)} did not come within {timeout_s} s. Here are "
            f"{by_host({r: json.loads(store.get(keys[r]))['host'] for r in present})}"
        ) from error
    problems = sorted({text for record in store.multi_get(keys) if (text := json.loads(record)["problem"])})
    if problems:
        raise ConnectionError("; ".join(problems))
    return store


def describe_host() -> dict[str, str]:
    """What the others must know: the host's name, its address, and what is wrong with its interface, if anything."""
    host, wanted = host_name(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    interfaces = {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    known = [name for name in wanted.split(",") if name in interfaces]
    problem = ""
    if wanted and not known:
        found = ", ".join(f"{name} {address}" for name, address in interfaces.items())
        problem = f"GLOO_SOCKET_IFNAME={wanted}: {host} has no such interface with an address; it has {found or 'none'}"
    address = f"{interfaces[known[0]]} on {known[0]}" if known else "its default interface"
    return {"host": host, "address": address, "problem": problem}


def explain_no_connection(store: dist.Store, world_size: int) -> str:
    """Who tried to connect from which address, for ranks that share a store and still cannot talk to each other."""
    records = [json.loads(record) for record in store.multi_get([f"host/{r}" for r in range(world_size)])]
    places = sorted({f"{record['host']} uses {record['address']}" for record in records})
    return (
        f"the ranks found each other's names and cannot connect: {'; '.join(places)}. Name an interface that reaches "
        "every host with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def run_store() -> dist.Store:
    return dist.PrefixStore("engine", dist.distributed_c10d._get_default_store())


def introduce() -> None:
    """Note in the run's store where this rank is. After the process group is there; every rank must call."""
    run_store().set(f"host/{dist.get_rank()}", host_name())


@contextmanager
def host_by_host(timeout_s: int) -> Iterator[None]:
    """The block runs on rank 0, then on the first rank of every other host, then on the rest: what the first one
    downloads or builds, the others find, in a cache that hosts share or in one of their own. All ranks must call.

    A block that raises lets the others go on, who then see for themselves.

    Raises:
        ConnectionError: where the turn does not come within `timeout_s`.
    """
    rank, turn, store = dist.get_rank(), next(_turns), run_store()
    first = rank - local_rank()
    before = None if rank == 0 else 0 if rank == first else first
    end_s = time.monotonic() + timeout_s
    # Polls: a wait would hold the store's lock, which NCCL's watchdog needs as well.
    while before is not None and not store.check([f"turn/{turn}/{before}"]):
        if time.monotonic() > end_s:
            raise ConnectionError(
                f"rank {rank} on {host_name()} waited {timeout_s} s (prepare_timeout_s) for rank {before} to read the "
                "input"
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        store.set(f"turn/{turn}/{rank}", "done")


def claim_failure() -> bool | None:
    """Whether this rank is the first of the run to fail; None where the store is gone, and rank 0 with it."""

    def claim() -> bool:
        store = run_store()
        store.set(f"failed/{dist.get_rank()}", "")
        return store.add("num_failed", 1) == 1

    return bounded(claim, STORE_WAIT_S)


def silent_ranks() -> dict[int, str]:
    """Ranks that have reported no failure, with their hosts, a moment after a collective broke."""
    time.sleep(FAILURE_WAIT_S)

    def ask() -> dict[int, str]:
        store = run_store()
        silent = [r for r in range(dist.get_world_size()) if not store.check([f"failed/{r}"])]
        return {r: store.get(f"host/{r}").decode() for r in silent}

    return bounded(ask, STORE_WAIT_S) or {}


def bounded(function: Callable[[], T], seconds: float) -> T | None:
    """The function's result; None where it fails or takes longer, as a store call does whose host has gone."""
    results: list[T] = []

    def call() -> None:
        try:
            results.append(function())
        except (dist.DistError, RuntimeError):
            return  # the caller sees no result

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def name_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def by_host(hosts: dict[int, str]) -> str:
    """`ranks 0, 1 on n1; ranks 2, 3 on n2`."""
    groups: dict[str, list[int]] = {}
    for rank, host in sorted(hosts.items()):
        groups.setdefault(host, []).append(rank)
    return "; ".join(f"{name_ranks(ranks)} on {host}" for host, ranks in groups.items())

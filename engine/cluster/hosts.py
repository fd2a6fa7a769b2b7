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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

T = TypeVar("T")

FAILURE_WAIT_S = 5  # ranks of one broken collective give up within a moment of each other
POLL_S = 0.2
KNOCK_S = 5
CONNECT_SLACK_S = 2  # torch's own words on a connection that failed come first
STORE_WAIT_S = 10  # an answer of a store whose host may be gone

_turns = count()


def host_name() -> str:
    """This host's name; Slurm's own name of the node, where it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_per_node() -> int:
    """Ranks of this node as the launcher says, else 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def meet(backend: str, timeout_s: int) -> dist.Store:
    """The store of this run, once every rank has come to it. Every rank that the launcher started must call.

    Raises:
        ValueError: where the launcher left out one of torch's variables.
        ConnectionError: where ranks stay away for `timeout_s`, a host has no interface of the name it is to use, or
            hosts cannot reach each other by their interfaces.
    """
    unset = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ValueError(f"RANK is set and {', '.join(unset)} not: set all of them, or none to run alone")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)

    def connect() -> dist.Store:
        return dist.TCPStore(address, port, world_size, rank == 0 and not has_agent, timeout, wait_for_workers=False)

    try:  # torch 2.13 itself waits for ever for the first answer of whatever listens there
        store: dist.Store = within(timeout_s + CONNECT_SLACK_S, connect)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise ConnectionError(
            f"rank {rank} on {host_name()} found no rank 0 at {address}:{port} within {timeout_s} s: is it running, is "
            f"that address reachable from {host_name()}, is the port free, or does something else listen there? "
            f"({str(error).splitlines()[0]})"
        ) from error
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    keys = [f"host/{r}" for r in range(world_size)]
    store.set(keys[rank], json.dumps(describe_host(backend)))
    try:
        store.wait(keys, timeout)
    except (dist.DistError, RuntimeError) as error:
        absent = [r for r in range(world_size) if not store.check([keys[r]])]
        present = [r for r in range(world_size) if r not in absent]
        raise ConnectionError(
            f"{name_ranks(absent)} did not come within {timeout_s} s. Here are "
            f"{by_host({r: json.loads(store.get(keys[r]))['host'] for r in present})}"
        ) from error
    records = [json.loads(record) for record in store.multi_get(keys)]
    problems = sorted({record["problem"] for record in records if record["problem"]})
    if not problems:
        problems = find_closed_doors(store, records, timeout_s)
        if problems:
            problems.append(f"name an interface that reaches every host with {backend.upper()}_SOCKET_IFNAME")
    if problems:
        raise ConnectionError("; ".join(problems))
    return store


def describe_host(backend: str) -> dict[str, Any]:
    """What the others must know: the host's name, the address that it offers them, and what is wrong with that."""
    host, variable = host_name(), f"{backend.upper()}_SOCKET_IFNAME"
    wanted = os.environ.get(variable, "")
    interfaces = {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    record = {"host": host, "local_rank": local_rank(), "address": "", "interface": "", "problem": ""}
    if not wanted or wanted.startswith("^"):
        return record | {"address": default_address(backend), "interface": "its default interface"}
    is_exact = backend == "gloo" or wanted.startswith("=")
    names = wanted.removeprefix("=").split(",")
    known = [own for own in interfaces if any(own == name if is_exact else own.startswith(name) for name in names)]
    if known:
        return record | {"address": interfaces[known[0]], "interface": known[0]}
    found = ", ".join(f"{name} {address}" for name, address in interfaces.items())
    return record | {"problem": f"{variable}={wanted}: {host} has no such interface with an address; it has {found}"}


def default_address(backend: str) -> str:
    """The address that gloo offers, that of the host's name; for NCCL, the one from which rank 0 is reached. Empty
    where it is not one of IPv4."""
    try:
        if backend == "gloo":
            return socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            return probe.getsockname()[0]
    except OSError:
        return ""


def find_closed_doors(store: dist.Store, records: list[dict[str, Any]], timeout_s: int) -> list[str]:
    """Which host cannot reach which: the first rank of each opens a port at its address, and all the others knock.

    Collectives over an interface that leads nowhere would fail too, after many times the timeout and without a name.
    """
    # By place, not by name: hosts that share a name are among those that this is for.
    firsts = sorted({rank - record["local_rank"] for rank, record in enumerate(records)})
    if len(firsts) == 1 or not all(record["address"] for record in records):
        return []
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=timeout_s)
    verdicts = [f"verdict/{first}" for first in firsts]
    if rank in firsts:
        own = records[rank]
        with socket.create_server((own["address"], 0), backlog=len(firsts)) as door:
            store.set(f"door/{rank}", str(door.getsockname()[1]))
            store.wait([f"door/{first}" for first in firsts], timeout)

            def knock(first: int) -> str | None:
                other = records[first]
                try:
                    socket.create_connection((other["address"], int(store.get(f"door/{first}"))), KNOCK_S).close()
                except OSError as error:
                    places = [f"{place['host']} ({place['address']} on {place['interface']})" for place in (own, other)]
                    return f"{places[0]} cannot reach {places[1]}: {error}"
                return None

            with ThreadPoolExecutor(max_workers=16) as knockers:
                found = [text for text in knockers.map(knock, (first for first in firsts if first != rank)) if text]
            store.set(f"verdict/{rank}", json.dumps(found))
            store.wait(verdicts, timeout)
    store.wait(verdicts, timeout)
    return sorted({text for verdict in store.multi_get(verdicts) for text in json.loads(verdict)})


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


def close_report() -> None:
    """Let the ranks in `await_report` go: the first failure has been told in full."""
    bounded(lambda: run_store().set("reported", ""), STORE_WAIT_S)


def await_report() -> None:
    """Stay until the first failure has been told: a launcher ends a host's other ranks when one of them exits."""

    def wait() -> None:
        while not run_store().check(["reported"]):
            time.sleep(POLL_S)

    bounded(wait, FAILURE_WAIT_S + STORE_WAIT_S)


def bounded(function: Callable[[], T], seconds: float) -> T | None:
    """The function's result; None where it fails or takes longer, as a store call does whose host has gone."""
    try:
        return within(seconds, function)
    except (dist.DistError, RuntimeError, TimeoutError):
        return None


def within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result, or its error.

    Raises:
        TimeoutError: where it takes longer; it goes on in its thread, which does not keep the process alive.
    """
    done: Future[T] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except Exception as error:  # raised where the result is asked for
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return done.result(seconds)
    except FutureTimeoutError as error:
        raise TimeoutError(f"no answer within {seconds} s") from error


def name_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def by_host(hosts: dict[int, str]) -> str:
    """`ranks 0, 1 on n1; ranks 2, 3 on n2`."""
    groups: dict[str, list[int]] = {}
    for rank, host in sorted(hosts.items()):
        groups.setdefault(host, []).append(rank)
    return "; ".join(f"{name_ranks(ranks)} on {host}" for host, ranks in groups.items())

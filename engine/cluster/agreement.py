"""All ranks agree: the same value, the same record, or the same error on each of them.

The one home of object collectives. Every function that communicates says "All ranks must call"; a process without a
process group is the only rank. Knows hosts and Python values; nothing of models, rows or checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from engine.cluster import hosts
from engine.errors import CheckpointError

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order. All ranks must call."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's value. All ranks must call."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def union(own: dict[str, T]) -> dict[str, T]:
    """Every rank's entries in one dict, sorted by key. All ranks must call."""
    return dict(sorted((key, value) for one in gather(own) for key, value in one.items()))


def attempt(
    action: Callable[[], T], failures: tuple[type[Exception], ...], tell: Callable[[Exception], str] = str
) -> tuple[T | None, list[tuple[str, str | None]]]:
    """The action's result here, and from every rank its host and what it tells of its failure (None: it had none).

    All ranks must call; the action must not communicate, unless it fails on no rank or on all.
    """
    result, problem = None, None
    try:
        result = action()
    except failures as error:
        problem = tell(error)
    return result, gather((hosts.host_name(), problem))


def together(action: Callable[[], T]) -> T:
    """The action's result; a ValueError on any rank is raised on all of them, with the ranks it happened on.

    All ranks must call; the action must not communicate.
    """
    result, outcomes = attempt(action, (ValueError,))
    problems = merge_problems(
        [host for host, _ in outcomes], [[] if problem is None else [problem] for _, problem in outcomes]
    )
    if problems:
        raise ValueError("; ".join(problems))
    return cast(T, result)


def all_or_none(what: str, folder: Path, action: Callable[[], T]) -> T:
    """The result of an action that writes under `folder`; where it fails on one rank, it fails on all.

    All ranks must call.

    Raises:
        CheckpointError: `what`, the ranks, their errors, and how full the disk under `folder` is.
    """

    def tell(error: Exception) -> str:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return f"rank {rank}: {error} (disk: {shutil.disk_usage(folder).free / 2**20:.1f} MiB free)"

    result, outcomes = attempt(action, (OSError, CheckpointError), tell)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise CheckpointError(f"{what}: {'; '.join(problems)}")
    return cast(T, result)


def raise_together(problem: str | None) -> None:
    """Raise a ValueError on every rank where one has a problem, which it may alone have seen. All ranks must call."""
    found = next((text for text in gather(problem) if text is not None), None)
    if found is not None:
        raise ValueError(found)


def require_same(record: dict[str, str]) -> None:
    """Raise ValueError where a rank's record is not that of the others. All ranks must call."""
    gathered = gather((hosts.host_name(), record))
    problems = differences([own for _, own in gathered], [host for host, _ in gathered])
    if problems:
        raise ValueError("the ranks are not alike: " + "; ".join(problems))


def merge_problems(where: list[str], problems: list[list[str]]) -> list[str]:
    """Each problem once, headed by the ranks that have it unless all do. `where` has each rank's host."""
    ranks_of: dict[str, dict[int, str]] = {}
    for rank, own in enumerate(problems):
        for text in own:
            ranks_of.setdefault(text, {})[rank] = where[rank]
    return [text if len(at) == len(where) else f"{hosts.by_host(at)}: {text}" for text, at in ranks_of.items()]


def differences(records: list[dict[str, str]], where: list[str]) -> list[str]:
    """One line per entry that is not the same on all ranks; `where` has each rank's host."""
    lines = []
    for name in sorted({name for record in records for name in record}):
        values: dict[str, dict[int, str]] = {}
        for rank, record in enumerate(records):
            values.setdefault(record.get(name, "not there"), {})[rank] = where[rank]
        if len(values) > 1:
            lines.append(f"{name} differs: " + ", but ".join(f"{v} on {hosts.by_host(at)}" for v, at in values.items()))
    return lines

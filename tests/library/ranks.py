"""Real process groups for tests: rank processes that start once per world size and run many checks.

`Ranks(n).run(function, *args)` calls a module-level function on every rank and returns the list of results. A rank's
exception comes back with its traceback; a rank that does not answer in time has its stacks dumped and is killed. Where
the machine allows, the ranks have a network of their own, so that bytes counted on its loopback are theirs.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing

from engine.bench.loopback import private_loopback, why_not_private


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    log = open(Path(folder) / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    import torch
    import torch.distributed as dist

    from engine.cluster.startup import init_distributed

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    init_distributed(timeout_s=120)
    while True:
        task = pipe.recv()
        if task is None:
            return
        function, args, deadline_s = task
        faulthandler.dump_traceback_later(deadline_s, file=log)
        try:
            answer = ("ok", function(*args))
        except (Exception, pytest.fail.Exception):  # every failure of a check goes back to the test that asked
            answer = ("failed", traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


class Ranks:
    """A process group of `world_size` gloo ranks on this machine."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.mkdtemp(prefix=f"ranks{world_size}_")
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        with private_loopback() if why_not_private() is None else nullcontext():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world_size, self.folder, theirs), daemon=True)
                process.start()
                self.pipes.append(ours)
                self.processes.append(process)

    def run(self, function, *args, deadline_s: float = 180) -> list:
        for pipe in self.pipes:
            pipe.send((function, args, deadline_s))
        end = time.monotonic() + deadline_s + 5
        answers: list = [None] * self.world_size
        while None in answers and time.monotonic() < end:
            for rank, pipe in enumerate(self.pipes):
                if answers[rank] is None and pipe.poll(0.01):
                    answers[rank] = pipe.recv()
            if any(answer and answer[0] == "failed" for answer in answers):
                end = min(end, time.monotonic() + 5)  # the others may be waiting for the one that failed
        failed = [f"--- rank {r}\n{a[1]}" for r, a in enumerate(answers) if a and a[0] == "failed"]
        silent = [r for r, a in enumerate(answers) if a is None]
        if failed or silent:
            logs = [
                f"--- rank {r} gave no answer; its log:\n{(Path(self.folder) / f'rank{r}.log').read_text()[-3000:]}"
                for r in silent
            ]
            if silent:
                self.stop()
            raise AssertionError("\n".join(failed + logs))
        return [answer[1] for answer in answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if process.is_alive():
                process.kill()
            process.join()
            pipe.close()


def worlds() -> Iterator[Callable[[int], Ranks]]:
    """What a fixture `ranks` yields: `ranks(n)` are n rank processes, started once, and again after a check that hung.

    A fixture of one folder's tests, not of the session: every group that a check has made keeps its threads, and idle
    ranks with hundreds of them slow all other tests down.
    """
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in started or not started[world_size].alive:
            started[world_size] = Ranks(world_size)
        return started[world_size]

    yield get
    for world in started.values():
        world.stop()

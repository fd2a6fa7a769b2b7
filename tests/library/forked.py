"""Training commands whose ranks can be signalled and killed one by one.

`ForkedRun` starts the ranks of `python -m engine WORDS` as processes forked from a server that has imported the engine
already: a run starts in a second instead of ten, which makes many kills affordable.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.library.launch import free_port

if TYPE_CHECKING:
    from transformers import TrainerCallback

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["engine.trainer", "transformers.models.llama.modeling_llama", "tests.library.models", "datasets"]
)


def _rank(rank: int, world_size: int, port: str, log: str, words: list[str], before: Callable | None) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1", WANDB_MODE="offline",
    )  # fmt: skip
    file = open(log, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    import torch

    from engine.cli import main

    torch.set_num_threads(1)
    if before is not None:
        add_callbacks(before())
    status = main(words)
    sys.stdout.flush()
    os._exit(status)  # as a forked process that has nothing to tidy up


def add_callbacks(callbacks: list[TrainerCallback] | None) -> None:
    """Let the commands of this process train with callbacks."""
    from engine import trainer

    if callbacks:
        trainer.GKDTrainer = functools.partial(trainer.GKDTrainer, callbacks=callbacks)


class ForkedRun:
    """`before`, a picklable callable, runs in each rank before the command; callbacks that it returns see the run."""

    def __init__(self, world_size: int, words: list[str], folder: Path, before: Callable | None = None) -> None:
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
        self.processes = [
            _context.Process(target=_rank, args=(rank, world_size, port, str(log), words, before), daemon=True)
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal; nothing happens to a rank that has ended."""
        try:
            os.kill(self.processes[rank].pid, number)
        except ProcessLookupError:
            assert self.processes[rank].exitcode is not None

    def kill_all(self) -> None:
        for rank in range(len(self.processes)):
            self.signal(rank, signal.SIGKILL)
        self.wait(10)

    def wait(self, deadline_s: float) -> list[int]:
        """Exit status of every rank; a rank that lives on past the deadline fails the test."""
        end = time.monotonic() + deadline_s
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            text = self.text()
            for process in self.processes:
                process.kill()
            raise AssertionError(f"ranks still run after {deadline_s} s\n{text}")
        return [process.exitcode for process in self.processes]

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], deadline_s: float = 60, poll_s: float = 0.005) -> bool:
        """Wait for a condition; False where a rank ended first."""
        end = time.monotonic() + deadline_s
        while not condition():
            if not self.is_running():
                return False
            assert time.monotonic() < end, f"nothing after {deadline_s} s\n{self.text()}"
            time.sleep(poll_s)
        return True

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs if log.exists())

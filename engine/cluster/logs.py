"""The console and the log files of a run: one voice, and a traceback that can be found.

Rank 0 owns the console, which shows the run's own lines, the engine's log and errors. What other libraries and other
ranks print goes into `logs/rank_<k>.log` of the run folder. When a run breaks, the rank that failed first prints its
traceback on the console, last; the others keep theirs in their files.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from engine.cluster import hosts
from engine.errors import BadStepsError, CheckpointError

_console: TextIO | None = None  # of a rank whose stderr goes to a file
_lines: TextIO | None = None  # the console's stdout, of rank 0
_log_path: Path | None = None

USER_ERRORS = (ValueError, ConnectionError)  # exit status 2
ONE_LINE = (*USER_ERRORS, CheckpointError, BadStepsError)  # told without a traceback: the text says what to do


def open_rank_log(output_dir: Path, log_format: str) -> None:
    """Send stdout and stderr of this rank to its file in the run folder; rank 0 keeps a way to the console.

    `log_format` is that of the engine's log there.

    Raises:
        ValueError: where the folder cannot be written.
    """
    global _console, _lines, _log_path
    try:
        sys.stdout.fileno(), sys.stderr.fileno()
    except OSError:  # somebody reads them in Python, as a notebook does
        return
    rank = int(os.environ.get("RANK", 0))
    path = output_dir / "logs" / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", buffering=1)
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} cannot be written on {hosts.host_name()}: {error}") from error
    _log_path, _console = path, os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    sys.stdout.flush()
    if rank == 0:
        _lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        handler = logging.StreamHandler(_console)
        handler.setFormatter(logging.Formatter(log_format))
        logging.getLogger("engine").addHandler(handler)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    logging.getLogger().setLevel(logging.INFO)


def lines_out() -> TextIO:
    """Where the run's own lines go: the console, or the file of a rank that has none."""
    return _lines or sys.stdout


@contextmanager
def bars_on_console() -> Iterator[None]:
    """Within, progress bars of libraries show on rank 0's console, where that is a terminal, and not in its file."""
    if _lines is None or not _lines.isatty():
        yield
        return
    with redirect_stderr(_lines):  # where a bar looks that is told of no file
        yield


def report_failure(error: Exception) -> int:
    """Tell of a failure where it belongs, and return the exit status: 2 for a user's mistake, else 1.

    Once the ranks have met, only the first one to fail uses the console. Before that, the first rank of each host.
    """
    is_mistake = isinstance(error, ONE_LINE) and not os.environ.get("GKD_TRACEBACK")
    text = f"error: {error}" if is_mistake else "".join(traceback.format_exception(error)).rstrip()
    if _console is not None:
        print(text, file=sys.stderr, flush=True)
    console = _console or sys.stderr
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if hosts.local_rank() == 0:
            print(text, file=console, flush=True)
        return 2 if isinstance(error, USER_ERRORS) else 1
    is_first = hosts.claim_failure()
    if is_first:
        heading = "" if is_mistake else f"rank {dist.get_rank()} on {hosts.host_name()}:\n"
        print(heading + text, file=console, flush=True)
        silent = hosts.silent_ranks() if is_broken_link(error) else {}
        if silent:
            print(f"error: no answer from {hosts.by_host(silent)}", file=console, flush=True)
        hosts.close_report()
    elif is_first is not None and is_broken_link(error):
        hosts.await_report()
    elif is_first is None and hosts.local_rank() == 0 and not isinstance(error, ValueError):
        # The store lived in rank 0's process, which has reported its own failure if it had the time.
        print(f"error: lost rank 0; the traceback is in {_log_path}", file=console, flush=True)
    return 2 if isinstance(error, USER_ERRORS) else 1


def is_broken_link(error: Exception) -> bool:
    """Whether a collective failed, rather than the code of this rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    )

"""Starting the real commands: launchers, ports, deadlines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.library.paths import ROOT


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launcher(kind: str, num_ranks: int) -> list[str]:
    """The words before `engine ...` or `script.py ...` that start `num_ranks` ranks on this machine."""
    folder = Path(sys.executable).parent
    if kind == "deepspeed":
        return [str(folder / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", free_port()]
    if kind == "torchrun":
        return [str(folder / "torchrun"), "--nproc_per_node", str(num_ranks), "--master_port", free_port()]
    return [sys.executable]


def run(command: list[str], deadline_s: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run to the end, in a process group of its own, which is killed as a whole at the deadline."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"} | environment
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {deadline_s} s: {' '.join(command)}\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, "")

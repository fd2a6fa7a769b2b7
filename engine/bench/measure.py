"""Measuring: time, peak memory and bytes on the wire, of one rank process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclass
class Measured:
    """One run of a function.

    Attributes:
        seconds: wall time, device included.
        peak_bytes: highest memory during the run over that before it, what it returned included.
        sent_bytes: bytes through the ranks' loopback interface, all of them theirs where it is their own (loopback.py);
            None where they do not go through it.
    """

    seconds: float
    peak_bytes: int
    sent_bytes: int | None


def measure(function: Callable[[], object]) -> Measured:
    """Run `function` once on every rank at the same time. All ranks must call."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    gc.collect()
    _barrier()
    sent_before = loopback_bytes() if on_cpu else 0
    _barrier()
    before = _reset_peak(on_cpu)
    accelerator.synchronize()
    started = time.perf_counter()
    kept = function()
    accelerator.synchronize()
    seconds = time.perf_counter() - started
    peak = (_status_bytes("VmHWM") if on_cpu else accelerator.max_memory_allocated()) - before
    del kept
    _barrier()
    sent = loopback_bytes() - sent_before if on_cpu else None
    _barrier()
    return Measured(seconds, peak, sent)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _reset_peak(on_cpu: bool) -> int:
    """Forget the highest memory so far; return the present use."""
    if not on_cpu:
        get_accelerator().reset_peak_memory_stats()
        return get_accelerator().memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this process's network has received."""
    return received_bytes("lo")


def received_bytes(interface: str) -> int:
    """Bytes that a network interface of this host has received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[0])
    raise RuntimeError(f"/proc/net/dev has no {interface}")

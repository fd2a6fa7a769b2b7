"""Seconds of a step's phases. Knows clocks and nothing else; no collectives."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator


class Phases:
    """Seconds of named phases, until they are taken.

    On an accelerator they are read off events in its stream, so that work counts where it runs and nothing waits; on
    CPU off the host's clock.
    """

    def __init__(self) -> None:
        self._has_events = get_accelerator().device_name() != "cpu"
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def _mark(self) -> Any:
        if not self._has_events:
            return time.perf_counter()
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add this block to the phase `name`."""
        start = self._mark()
        try:
            yield
        finally:
            self._marks[name].append((start, self._mark()))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for the device to get there."""
        taken = {}
        for name, pairs in self._marks.items():
            if self._has_events:
                pairs[-1][1].synchronize()
                taken[name] = sum(start.elapsed_time(stop) for start, stop in pairs) / 1000
            else:
                taken[name] = sum(stop - start for start, stop in pairs)
        self._marks.clear()
        return taken

"""Progress of a run on the console: a bar in a terminal, plain lines elsewhere, both with the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from engine.cluster.logs import lines_out

FORMATS = {
    "train/loss": "loss {:.4f}",
    "train/divergence": "divergence {:.4f}",
    "train/grad_norm": "grad norm {:.3f}",
    "train/lr": "lr {:.2e}",
    "perf/tokens_per_s": "{:.0f} tokens/s",
}


class Progress:
    """Shows steps `first_step + 1` to `total_steps`: lines come where somebody wants them.

    With `has_ends` the first and the last step have one as well.
    """

    def __init__(self, first_step: int, total_steps: int, has_ends: bool = True, has_bar: bool = True) -> None:
        self.first_step, self.total_steps = first_step, total_steps
        self._ends = (first_step + 1, total_steps) if has_ends else ()
        self._start_s = time.perf_counter()
        self._bar: tqdm | None = None
        self._out = lines_out()
        if has_bar and self._out.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", file=self._out, dynamic_ncols=True)

    def show(self, step: int, metrics: Mapping[str, Any], is_wanted: bool = False) -> None:
        if "train/loss" in metrics:
            figures = [text.format(metrics[name]) for name, text in FORMATS.items() if metrics.get(name) is not None]
            if self._bar is not None:
                self._bar.set_postfix_str(" | ".join(figures), refresh=False)
                self._bar.update(step - self._bar.n)
            elif is_wanted or step in self._ends:
                self._print(" | ".join([self._place(step), *figures, *self._time_left(step)]))
        held_out = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if held_out:
            figures = [f"{name} {value:.4f}" for name, value in held_out.items() if isinstance(value, float)]
            self._print(" | ".join([self._place(step), *figures]))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _place(self, step: int) -> str:
        return f"step {step}/{self.total_steps}"

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, file=self._out, flush=True)

    def _time_left(self, step: int) -> list[str]:
        if not self.first_step < step < self.total_steps:
            return []
        step_s = (time.perf_counter() - self._start_s) / (step - self.first_step)
        return [f"ETA {format_duration(step_s * (self.total_steps - step))}"]


def format_duration(seconds: float) -> str:
    """`1h02m`, `4m10s` or `9s`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"

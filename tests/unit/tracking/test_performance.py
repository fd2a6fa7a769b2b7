"""Figures of a step: phases, model FLOPs counted by hand, progress with and without a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch

from engine.data.batch import Sample, pack
from engine.tracking.performance import PEAK_FLOPS, Meter, matrix_parameters
from engine.tracking.progress import Progress
from engine.tracking.timing import Phases
from tests.library.models import tiny_llama


def test_phases_add_up_until_taken():
    phases = Phases()
    for _ in range(2):
        with phases.time("loss"):
            time.sleep(0.02)
    with pytest.raises(KeyError), phases.time("rollout"):
        raise KeyError
    taken = phases.take()
    assert 0.04 <= taken["loss"] < 0.5 and "rollout" in taken and phases.take() == {}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_counted_once(tied):
    """Hidden 16, intermediate 32, two heads of 8, one key-value head, two layers, vocabulary 100."""
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
    assert matrix_parameters(tiny_llama(tied=tied)) == (2 * per_layer, 1600)


def test_flops_of_a_step():
    student, teacher = tiny_llama(hidden_size=16), tiny_llama(hidden_size=24)
    meter = Meter(student, teacher)
    batch = pack([Sample([1, 2], [1, 2, 3, 4, 5], [False, False, True, True, True], 0)], "cpu")
    (body, head), (teacher_body, teacher_head) = matrix_parameters(student), matrix_parameters(teacher)
    forward, teacher_forward = 2 * (5 * body + 3 * head), 2 * (5 * teacher_body + 3 * teacher_head)
    assert meter.step_flops([batch], False, False) == 3 * forward + teacher_forward
    assert meter.step_flops([batch, batch], True, False) == 2 * (4 * forward + teacher_forward)
    assert meter.step_flops([batch], False, True) == 3 * forward + 2 * teacher_forward


def test_utilisation_needs_a_known_peak():
    meter = Meter(tiny_llama(), tiny_llama())
    batch = pack([Sample([1], [1, 2], [False, True], 0)], "cpu")
    assert "perf/mfu" not in meter.metrics([batch], False, False, 1.0)
    meter.peak_flops = PEAK_FLOPS["H100"]
    figures = meter.metrics([batch], False, False, 0.5)
    assert figures["perf/mfu"] == pytest.approx(figures["perf/tflops_per_s"] / 989)
    assert figures["perf/tflops_per_s"] == pytest.approx(2 * meter.step_flops([batch], False, False) / 1e12)
    assert 0.01 < figures["perf/memory_peak_gib"] < 1000


def test_a_mixture_of_experts_has_no_flops():
    sparse = tiny_llama()
    sparse.experts = torch.nn.Linear(1, 1)
    batch = pack([Sample([1], [1, 2], [False, True], 0)], "cpu")
    assert set(Meter(sparse, tiny_llama()).metrics([batch], False, False, 1.0)) == {"perf/memory_peak_gib"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(first_step=2, total_steps=6)
    for step in (3, 4, 5, 6):
        progress.show(step, {"train/loss": 0.25, "eval/perplexity": 3.5} if step == 4 else {"train/loss": 0.5})
    progress.close()
    text = terminal.getvalue()
    assert "6/6" in text and "loss 0.5000" in text and "step 4/6 | eval/perplexity 3.5000" in text
    assert "step 3/6" not in text  # the bar says it


@pytest.mark.parametrize(("has_ends", "shown"), [(True, [3, 5, 6]), (False, [5])])
def test_lines_are_of_the_ends_and_of_steps_that_are_wanted(monkeypatch, has_ends, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    lines = Progress(first_step=2, total_steps=6, has_ends=has_ends, has_bar=False)
    for step in (3, 4, 5, 6):
        lines.show(step, {"train/loss": 0.5}, is_wanted=step == 5)
    assert [int(line[5]) for line in terminal.getvalue().splitlines()] == shown

"""Training runs whose loss or gradient is made infinite at chosen steps."""

from __future__ import annotations

import dataclasses

import torch

from engine import GKDConfig, GKDTrainer
from engine.errors import BadStepsError


def spoil(trainer: GKDTrainer, kind: str, steps: list[int], rank: int) -> None:
    """Make the loss, or only its gradient, infinite on one rank at some steps, in the second micro-batch."""
    student, teacher = trainer.run.student, trainer.run.teacher
    signals, hidden = teacher.signals, student.hidden
    is_bad = False

    def spoilt_signals(batches):
        nonlocal is_bad
        for micro, signal in enumerate(signals(batches)):
            is_bad = trainer.loop.state.step + 1 in steps and trainer.run.rank == rank and micro == 1
            if is_bad and kind == "loss":
                signal = dataclasses.replace(signal, hidden_NH=signal.hidden_NH * torch.nan)
            yield signal

    def spoilt_hidden(batch, step=None):
        student_NH = hidden(batch, step)
        if is_bad and kind == "gradient":
            student_NH.register_hook(lambda grad: grad * torch.inf)
        return student_NH

    teacher.signals, student.hidden = spoilt_signals, spoilt_hidden


def train_spoilt(fields: dict, kind: str, steps: list[int], rank: int) -> dict:
    """Train with spoilt steps; the whole student after each step, in fp32, and the error that ended it."""
    trainer = GKDTrainer(args=GKDConfig(**fields))
    spoil(trainer, kind, steps, rank)
    weights, error = [], None
    original = trainer.loop._train_step

    def recorded():
        try:
            return original()
        finally:
            with trainer.run.student.gathered() as model:
                weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy())

    trainer.loop._train_step = recorded
    try:
        trainer.train()
    except BadStepsError as raised:
        error = str(raised)
    trainer.run.student.engine.destroy()
    return {"weights": weights, "error": error, "bad_steps": trainer.loop.state.bad_steps}

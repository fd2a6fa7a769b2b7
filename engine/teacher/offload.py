"""A whole teacher and the student's optimizer state that take turns on the device, for runs where both do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from engine.data.batch import PackedBatch
from engine.models.backbone import HiddenStates
from engine.models.student import Student
from engine.teacher.interface import LocalTeacher
from engine.zero import partitions


class AlternatingTeacher(LocalTeacher):
    """Its weights are on the device while it scores or writes; the student's optimizer state is, otherwise.

    It scores all micro-batches of a step in one go and keeps their hidden states, T H_t elements.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model.to("cpu"), HiddenStates(model))
        self._device = device
        self._student_engine: deepspeed.DeepSpeedEngine | None = None  # it has the device to itself until `attach`

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._student_engine is not None:
            partitions.offload_optimizer(self._student_engine)
        self.model.to(self._device)
        try:
            yield
        finally:
            self.model.to("cpu")
            if self._student_engine is not None:
                partitions.reload_optimizer(self._student_engine)

    def attach(self, student: Student) -> None:
        super().attach(student)
        self._student_engine = student.engine

    def hidden_in_turn(self, batches: list[PackedBatch]) -> Iterator[torch.Tensor]:
        with self._turn():
            hidden = [self.hidden(batch) for batch in batches]
        yield from hidden

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        with self._turn():
            yield self.model

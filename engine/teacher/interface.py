"""What the trainer sees of a teacher, and what the teachers that run in the training processes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import deepspeed
import torch
from torch import nn

from engine.data.batch import PackedBatch
from engine.loss.head import HeadShard, HeadSpec, build_teacher_head
from engine.loss.signal import HiddenSignal, Signal
from engine.models.backbone import hidden_states
from engine.models.structure import describe_head
from engine.models.student import Student
from engine.zero import partitions


class Teacher(ABC):
    """Whoever the student learns from.

    Attributes:
        model: the Hugging Face model, whose FLOPs are counted; on `meta` where others run it.
    """

    model: nn.Module

    @abstractmethod
    def attach(self, student: Student) -> None:
        """Get to know the student, once, before the first signal. All ranks must call."""

    @abstractmethod
    def signals(self, batches: list[PackedBatch]) -> Iterator[Signal]:
        """What it says of each micro-batch of a step, in order. All ranks must call, and take all of them."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The whole model on every rank, to generate with. All ranks must call."""


class LocalTeacher(Teacher):
    """A frozen causal LM in evaluation mode, on every rank or partitioned over all of them.

    Attributes:
        model: the Hugging Face model inside.
        runner: what a forward goes through: the module itself, or its ZeRO-inference engine.
        head: how its hidden states become logits.
        head_shard: its resident head rows, those of the vocabulary ids that the student's head has on this rank.
    """

    def __init__(self, model: nn.Module, runner: nn.Module) -> None:
        self.model, self.runner = model, runner
        self.head: HeadSpec = describe_head(model)
        self.head_shard: HeadShard | None = None

    def attach(self, student: Student) -> None:
        ids_S, shared_vocab_size = student.head.ids_S, student.head.shared_vocab_size
        self.head_shard = build_teacher_head(self.head, ids_S, shared_vocab_size, student.engine.device)

    def signals(self, batches: list[PackedBatch]) -> Iterator[Signal]:
        assert self.head_shard is not None  # `attach` has fetched it
        for hidden_NH in self.hidden_in_turn(batches):
            yield HiddenSignal(hidden_NH, self.head_shard)

    def hidden_in_turn(self, batches: list[PackedBatch]) -> Iterator[torch.Tensor]:
        """`hidden` of each micro-batch, in order."""
        for batch in batches:
            yield self.hidden(batch)

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states that predict the response tokens, [N, H_t]. All ranks must call where partitioned."""
        return hidden_states(self.runner, batch)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        if isinstance(self.runner, deepspeed.DeepSpeedEngine):
            with partitions.gathered_for_generation(self.runner):
                yield self.model
        else:
            yield self.model

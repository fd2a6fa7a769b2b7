"""What a teacher says about one micro-batch, as the stream reads it: its logits, a chunk of tokens at a time.

The stream asks for a chunk early and takes the logits later, so that what a signal has to communicate overlaps with
the chunk before. Knows nothing of where the teacher runs.

Shapes: N tokens of this rank, M tokens of a chunk over the token group, S rows of the shard, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.cluster.collectives import VocabGroups, start_gather_span
from engine.loss.head import HeadShard
from engine.loss.projection import project


class Signal(Protocol):
    """A kind of signal is a class with these two; `Teacher.signals` yields it and the stream asks no more.

    Each shard's logits are those of the vocabulary ids that the student's shard has there (`Stream.ids_S`), `LOG_ZERO`
    where the teacher has none.
    """

    @property
    def floats_in_flight(self) -> int:
        """fp32 numbers per token of a chunk that it holds beside the logits, with the next chunk on its way."""
        ...

    def start(self, start: int, stop: int, groups: VocabGroups) -> Callable[[float], torch.Tensor]:
        """Begin to fetch tokens `start:stop` of every rank of the token group; all of them must call.

        The function returned waits, and gives this shard's logits over the temperature that it is told, fp32 [M, S],
        rank by rank. It is called once, and its result is overwritten.
        """
        ...


@dataclass(frozen=True)
class HiddenSignal:
    """A teacher's hidden states that predict the response tokens, [N, H], and the resident head rows they go with."""

    hidden_NH: torch.Tensor
    head: HeadShard

    @property
    def floats_in_flight(self) -> int:
        return 2 * self.hidden_NH.shape[1]

    def start(self, start: int, stop: int, groups: VocabGroups) -> Callable[[float], torch.Tensor]:
        take = start_gather_span(self.hidden_NH, start, stop, groups.tokens)
        return lambda temperature: project(take(), self.head, temperature)

"""What every teacher placement offers the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from engine.data.batch import PackedBatch
from engine.loss.head import HeadSpec
from engine.models.backbone import hidden_states
from engine.models.structure import describe_head
from engine.zero import partitions


class Teacher:
    """A frozen causal LM in evaluation mode, on every rank or partitioned over all of them.

    Attributes:
        model: the Hugging Face model inside.
        runner: what a forward goes through: the module itself, or its ZeRO-inference engine.
        head: how its hidden states become logits.
    """

    def __init__(self, model: nn.Module, runner: nn.Module) -> None:
        self.model, self.runner = model, runner
        self.head: HeadSpec = describe_head(model)

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states that predict the response tokens, [N, H_t]. All ranks must call where partitioned."""
        return hidden_states(self.runner, batch)

    def score(self, batches: list[PackedBatch]) -> Iterator[torch.Tensor]:
        """`hidden` of each micro-batch of a step, in order."""
        for batch in batches:
            yield self.hidden(batch)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The whole model on every rank, to generate with. All ranks must call where partitioned."""
        if isinstance(self.runner, deepspeed.DeepSpeedEngine):
            with partitions.gathered_for_generation(self.runner):
                yield self.model
        else:
            yield self.model

"""The frozen teacher: hidden states of response positions out, never logits.

A placement says where its parameters live. All give the same hidden states. A further placement is a subclass of
`Teacher` and an entry in `build_teacher`; the trainer sees only this interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from engine import zero
from engine.backbone import HiddenStates, compute_dtype, hidden_states, load_causal_lm
from engine.batch import PackedBatch
from engine.config import GKDConfig
from engine.loss.head import HeadSpec, describe_head
from engine.settings import fill_bucket_sizes, teacher_settings


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

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The whole model on every rank, to generate with. All ranks must call where partitioned."""
        if isinstance(self.runner, deepspeed.DeepSpeedEngine):
            with zero.gathered_for_generation(self.runner):
                yield self.model
        else:
            yield self.model


def build_teacher(config: GKDConfig, model: nn.Module | None, device: torch.device) -> Teacher:
    """The teacher in its configured placement, from a model object or `teacher_model_name_or_path`.

    All ranks must call.
    """
    settings = teacher_settings(config) if config.teacher_placement == "zero3" else None
    if model is None:
        model = load_causal_lm(config.teacher_model_name_or_path, config, settings)
    model.eval().requires_grad_(False)
    model.to(compute_dtype(config))
    if settings is None:
        return Teacher(model.to(device), HiddenStates(model))
    zero.moe_leaf_modules(model)
    fill_bucket_sizes(settings, model.config.get_text_config().hidden_size)
    runner, *_ = deepspeed.initialize(model=HiddenStates(model), config=settings)
    runner.eval()
    return Teacher(model, runner)

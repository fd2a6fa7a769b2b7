"""What training adds to the student's forward: noise on its embeddings, and the balance of its experts.

Neither takes part in rollouts or evaluation. No collectives here.

Shapes: T packed positions, L of one sequence, H hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.cluster.collectives import draw_seed
from engine.data.batch import PackedBatch
from engine.models.structure import unusable


class EmbeddingNoise:
    """NEFTune, arXiv 2310.05914: uniform noise in [-1, 1] times alpha / sqrt(L H) on the input embeddings.

    The noise of a sequence depends on (seed, step, its place in the global batch) alone, not on the rank, the
    micro-batch or what shares its row.
    """

    def __init__(self, embeddings: nn.Module, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._current: tuple[PackedBatch, int] | None = None
        embeddings.register_forward_hook(self._add)

    @contextmanager
    def over(self, batch: PackedBatch, step: int) -> Iterator[None]:
        """Within it the embeddings are those of that batch at that step, and get noise."""
        self._current = batch, step
        try:
            yield
        finally:
            self._current = None

    def _add(self, module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if self._current is None:
            return None
        batch, step = self._current
        generator, width = torch.Generator(embedded.device), embedded.shape[-1]
        parts = []
        for index, length in zip(batch.index_B, batch.length_B, strict=True):
            generator.manual_seed(draw_seed(self.seed, "neftune", step, index))
            noise_LH = torch.rand(length, width, generator=generator, device=embedded.device) * 2 - 1
            parts.append(noise_LH * (self.alpha / math.sqrt(length * width)))
        return embedded + torch.cat(parts).to(embedded.dtype).view_as(embedded)


class RouterBalance:
    """The load-balancing loss of a mixture of experts, arXiv 2101.03961 equations 4 to 6, over a packed micro-batch.

    Raises:
        ValueError: for a model whose class has no such loss.
    """

    def __init__(self, causal_lm: nn.Module, coefficient: float) -> None:
        if "router_aux_loss_coef" not in vars(causal_lm):  # what transformers' classes with the loss keep
            raise unusable(causal_lm, "router_aux_loss_coef is set, and it has no load-balancing loss: remove it")
        self.coefficient = coefficient
        self.num_experts, self.top_k = causal_lm.num_experts, causal_lm.num_experts_per_tok
        self.logits: tuple[torch.Tensor, ...] = ()  # of each layer's router in the last forward, [T, E]

    def loss(self) -> torch.Tensor:
        """Weighted, with a gradient; the logits are let go."""
        logits, self.logits = self.logits, ()
        return self.coefficient * load_balancing_loss_func(logits, self.num_experts, self.top_k)

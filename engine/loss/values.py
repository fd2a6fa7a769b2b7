"""The figures of a token, by name: what the stream sums over the vocabulary, and the values that become metrics.

Shapes: N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenSums(NamedTuple):
    """Sums over the whole vocabulary, fp32 [N] each, in the order in which a shard stacks its parts."""

    divergence: torch.Tensor
    k: torch.Tensor  # sum of u, the number that the gradient needs from the other shards
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    acceptance: torch.Tensor  # sum of min(p, q)
    num_shared_top: torch.Tensor  # ids that are the top of both models
    target: torch.Tensor  # the target's shifted logit, z_target - max
    spread: torch.Tensor  # sum of all shifted logits; zero without label smoothing


class TokenValues(NamedTuple):
    """What is known of each response token, fp32 [N] each, unclipped, in nats; the names are those of the metrics."""

    divergence: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    acceptance: torch.Tensor
    top1_agreement: torch.Tensor
    nll: torch.Tensor  # of the target, at temperature 1
    uniform_nll: torch.Tensor  # mean over the vocabulary, at temperature 1; known with label smoothing alone

    @classmethod
    def from_sums(cls, sums: TokenSums, log_sum_raw: torch.Tensor, temperature: float, num_ids: int) -> TokenValues:
        """`log_sum_raw`: the student's log-sum at temperature 1; `num_ids`: size of the vocabulary."""
        return cls(
            divergence=sums.divergence,
            student_entropy=sums.student_entropy,
            teacher_entropy=sums.teacher_entropy,
            acceptance=sums.acceptance,
            top1_agreement=sums.num_shared_top.clamp_max(1.0),
            nll=log_sum_raw - sums.target * temperature,
            uniform_nll=log_sum_raw - sums.spread * (temperature / num_ids),
        )

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self)

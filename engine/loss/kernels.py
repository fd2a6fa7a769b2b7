"""The element-wise part of the stream, on a block of tokens of one vocabulary shard, in fp32.

Plain functions of tensors, so that torch.compile can fuse each into one pass over the block. Logits are at the
temperature already; masked ones are LOG_ZERO, not -inf. The maths is that of `engine.loss.divergence`.

Shapes: N tokens, S vocabulary columns of the shard, G shards.
"""

from __future__ import annotations

import torch

from engine.loss.divergence import DIVERGENCES, DivergenceSpec
from engine.loss.values import TokenSums


def shard_statistics(student_NS: torch.Tensor, teacher_NS: torch.Tensor, temperature: float) -> torch.Tensor:
    """What a shard knows of both softmaxes: [5, N], to be merged over shards by `merge_statistics`.

    Rows: the student's max and sum of exp(z - max); the teacher's; the student's sum of exp(temperature * (z - max)),
    its normaliser at temperature 1.
    """
    student_max_N, teacher_max_N = student_NS.amax(-1), teacher_NS.amax(-1)
    shifted_NS = student_NS - student_max_N[:, None]
    raw_sum_N = None if temperature == 1.0 else (shifted_NS * temperature).exp().sum(-1)
    student_sum_N = shifted_NS.exp().sum(-1)
    teacher_sum_N = (teacher_NS - teacher_max_N[:, None]).exp().sum(-1)
    raw_sum_N = student_sum_N if raw_sum_N is None else raw_sum_N
    return torch.stack((student_max_N, student_sum_N, teacher_max_N, teacher_sum_N, raw_sum_N))


def merge_statistics(shards_G5N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Global softmax statistics from those of the G shards.

    Returns:
        norms_4N: student max, student log-sum, teacher max, teacher log-sum.
        log_sum_raw_N: the student's log-sum at temperature 1.
    """
    student_max_N, teacher_max_N = shards_G5N[:, 0].amax(0), shards_G5N[:, 2].amax(0)
    student_behind_GN = shards_G5N[:, 0] - student_max_N
    student_log_N = (shards_G5N[:, 1] * student_behind_GN.exp()).sum(0).log()
    teacher_log_N = (shards_G5N[:, 3] * (shards_G5N[:, 2] - teacher_max_N).exp()).sum(0).log()
    log_sum_raw_N = (shards_G5N[:, 4] * (student_behind_GN * temperature).exp()).sum(0).log()
    return torch.stack([student_max_N, student_log_N, teacher_max_N, teacher_log_N]), log_sum_raw_N


def log_probabilities(logits_NS: torch.Tensor, max_N: torch.Tensor, log_sum_N: torch.Tensor) -> torch.Tensor:
    """Log-softmax from global statistics. Max and log-sum are subtracted in turn: adding a small log-sum to a
    max of 1e4 first would round it away."""
    return (logits_NS - max_N[:, None]).sub_(log_sum_N[:, None])


def shard_sums(
    student_NS: torch.Tensor,
    teacher_NS: torch.Tensor,
    norms_4N: torch.Tensor,
    target_N: torch.Tensor,
    live_S: torch.Tensor | None,
    spec: DivergenceSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A shard's part of every sum over the vocabulary, [8, N], whose sums over shards are the values; and q and u,
    [N, S] each, from which `logit_gradient` goes on.

    Args:
        norms_4N: student max, student log-sum, teacher max, teacher log-sum.
        target_N: column of the target token in this shard, -1 where another shard has it.
        live_S: 1 for a column with a vocabulary id, else 0; needed with label smoothing alone.

    They are stacked in the order of `TokenSums`.
    """
    log_q = log_probabilities(student_NS, norms_4N[0], norms_4N[1])
    log_p = log_probabilities(teacher_NS, norms_4N[2], norms_4N[3])
    q, p = log_q.exp(), log_p.exp()
    f, u = DIVERGENCES[spec.kind].terms(log_q, log_p, q, p, spec)
    target = log_q.gather(1, target_N.clamp_min(0)[:, None])[:, 0] + norms_4N[1]
    is_top = (student_NS == norms_4N[0][:, None]) & (teacher_NS == norms_4N[2][:, None])
    spread = torch.zeros_like(target)
    if live_S is not None:
        spread = ((student_NS - norms_4N[0][:, None]) * live_S).sum(-1)
    sums = TokenSums(
        divergence=f.sum(-1),
        k=u.sum(-1),
        student_entropy=-log_q.mul_(q).sum(-1),
        teacher_entropy=-log_p.mul_(p).sum(-1),
        acceptance=torch.minimum(p, q).sum(-1),
        num_shared_top=is_top.any(-1).to(q.dtype),
        target=torch.where(target_N >= 0, target, 0.0),
        spread=spread,
    )
    return torch.stack(sums), q, u


def logit_gradient(
    q_NS: torch.Tensor,
    u_NS: torch.Tensor,
    k_N: torch.Tensor,
    weight_N: torch.Tensor,
    sft_weight_N: torch.Tensor,
    raw_scale_N: torch.Tensor,
    target_N: torch.Tensor,
    uniform_S: torch.Tensor | None,
    spec: DivergenceSpec,
) -> torch.Tensor:
    """Gradient of sum_N (weight * divergence + sft_weight * smoothed nll) for the logits before the temperature.

    Args:
        k_N: K summed over all shards. The shard's own K gives a wrong gradient under a right loss.
        raw_scale_N: turns q^temperature into the softmax at temperature 1.
        uniform_S: the uniform distribution over the vocabulary; needed with label smoothing alone.
    """
    gradient = (u_NS - q_NS * k_N[:, None]).mul_((weight_N / spec.temperature)[:, None])
    if spec.sft_weight:
        raw_q = q_NS**spec.temperature * raw_scale_N[:, None]
        gradient = gradient + raw_q * sft_weight_N[:, None]
        hit_N = torch.where(target_N >= 0, sft_weight_N * (1 - spec.label_smoothing), 0.0)
        if uniform_S is not None:
            gradient = gradient - sft_weight_N[:, None] * (uniform_S * spec.label_smoothing)
        gradient = gradient.scatter_add(1, target_N.clamp_min(0)[:, None], -hit_N[:, None])
    return gradient

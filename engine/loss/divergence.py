"""The divergences: their definition, a dense reference, and the element-wise pieces that the stream uses.

No distributed code and no model here. All of them have the form D = sum_i f(q_i, p_i) with q the student's
and p the teacher's softmax at a temperature. Then, with u_i = q_i * df/dq_i (up to a constant times q_i, which
cancels) and K = sum_i u_i,

    dD/dz_i = (u_i - q_i K) / temperature                for the student logit z_i,

so a vocabulary shard needs just one number from the other shards, K, to form its gradient. With
m the mixture named in the second column:

    kind               mixture m              f                                     u
    forward_kl         -                      p log(p/q)                            -p                (K = -1)
    reverse_kl         -                      q log(q/p)                            q log(q/p)
    jsd                beta p + (1-beta) q    beta p log(p/m) + (1-beta) q log(q/m) (1-beta) q log(q/m)
    skew_forward_kl    a p + (1-a) q          p log(p/m)                            -(1-a) q p/m
    skew_reverse_kl    (1-a) p + a q          q log(q/m)                            q log(q/m) - a q^2/m
    total_variation    -                      |p - q| / 2                           q sign(q - p) / 2

Sources: generalized JSD, arXiv 2306.13649 section 3; skew divergences, DistiLLM, arXiv 2402.03898.

Shapes: N tokens, V vocabulary, S vocabulary columns of one shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Stands for the logarithm of zero. Finite, so that 0 * log 0 is 0 without a branch; an id that is masked to
# -inf on both sides contributes nothing, one masked on the student's side only makes a forward KL about 1e30.
LOG_ZERO = -1e30
SMALLEST = 1.2e-38  # smallest normal fp32


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence, and its parameters.

    Attributes:
        kind: one of the table above.
        beta: weight of the teacher in the JSD; 0 is exactly KL(p||q), 1 exactly KL(q||p). The scale jumps at
            the ends: near p = q the gradient of the JSD is beta (1 - beta) times that of a KL.
        alpha: mixing weight of the skew divergences.
        temperature: divides both logits. There is no T^2 factor.
        token_clip: cap on one token's divergence in nats; where it binds the token's gradient is zero.
        sft_weight: weight of the target's negative log-likelihood (at temperature 1), added to the divergence.
    """

    kind: str = "jsd"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    token_clip: float | None = None
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            object.__setattr__(self, "kind", "forward_kl" if self.beta == 0.0 else "reverse_kl")
        if self.kind not in KINDS:
            raise ValueError(f"divergence kind {self.kind!r}: must be one of {', '.join(KINDS)}")


KINDS = ("jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def dense_divergence(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, spec: DivergenceSpec
) -> torch.Tensor:
    """Per-token divergence in nats, [N], by the definition and with ordinary autograd: the readable reference.

    Any float dtype; ids masked to -inf on both sides are allowed. `token_clip` applies, `sft_weight` does not.
    """
    log_q = torch.log_softmax(student_logits_NV / spec.temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits_NV / spec.temperature, dim=-1)
    if spec.kind == "total_variation":
        divergence_N = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    elif spec.kind == "forward_kl":
        divergence_N = _kl(log_p, log_q)
    elif spec.kind == "reverse_kl":
        divergence_N = _kl(log_q, log_p)
    elif spec.kind == "jsd":
        log_m = _log_mixture(log_p, log_q, spec.beta)
        divergence_N = spec.beta * _kl(log_p, log_m) + (1 - spec.beta) * _kl(log_q, log_m)
    elif spec.kind == "skew_forward_kl":
        divergence_N = _kl(log_p, _log_mixture(log_p, log_q, spec.alpha))
    else:
        divergence_N = _kl(log_q, _log_mixture(log_q, log_p, spec.alpha))
    return divergence_N if spec.token_clip is None else divergence_N.clamp(max=spec.token_clip)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a||b), [N]; terms with a = 0 are zero, in the gradient too."""
    live = log_a > -math.inf
    log_ratio = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return (torch.where(live, log_a, LOG_ZERO).exp() * log_ratio).sum(-1)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, weight_a: float) -> torch.Tensor:
    """log(weight_a a + (1 - weight_a) b), with -inf masks kept out of the gradient."""
    if weight_a == 0.0:
        return log_b
    live = (log_a > -math.inf) | (log_b > -math.inf)
    safe_a, safe_b = (torch.where(live, x, 0.0) for x in (log_a, log_b))
    mixed = torch.logaddexp(safe_a + math.log(weight_a), safe_b + math.log1p(-weight_a))
    return torch.where(live, mixed, -math.inf)


# --- Element-wise pieces of the stream. Each works on a block of rows of one vocabulary shard, in fp32. They
# are plain functions of tensors, so that torch.compile can fuse each into one pass over the block. Logits are at the
# temperature already; masked ones are LOG_ZERO, not -inf.


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


def divergence_terms(
    log_q: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, p: torch.Tensor, spec: DivergenceSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """f and u of the table in this file's docstring, element-wise."""
    if spec.kind == "forward_kl":
        return p * (log_p - log_q), -p
    if spec.kind == "reverse_kl":
        f = q * (log_q - log_p)
        return f, f
    if spec.kind == "total_variation":
        return (p - q).abs() / 2, q * (q - p).sign() / 2
    if spec.kind == "jsd":
        log_m = log_mixture(p, q, spec.beta)
        u = (log_q - log_m).mul_(q).mul_(1 - spec.beta)
        return (log_p - log_m).mul_(p).mul_(spec.beta).add_(u), u
    a = spec.alpha
    if a == 0.0:  # the skew divergences without skew
        return divergence_terms(log_q, log_p, q, p, DivergenceSpec(spec.kind.removeprefix("skew_")))
    if spec.kind == "skew_forward_kl":
        log_m = log_mixture(p, q, a)
        return p * (log_p - log_m), (log_p - log_m).exp_().mul_(q).mul_(a - 1)
    log_m = log_mixture(q, p, a)
    f = q * (log_q - log_m)
    return f, f - (log_q - log_m).exp_().mul_(q).mul_(a)


def log_mixture(a: torch.Tensor, b: torch.Tensor, weight_a: float) -> torch.Tensor:
    """log(weight_a a + (1 - weight_a) b). Where both are below 1e-38 the logarithm is that of 1e-38: it only ever
    multiplies one of the two."""
    return torch.lerp(b, a, weight_a).clamp_min_(SMALLEST).log_()


def shard_sums(
    student_NS: torch.Tensor,
    teacher_NS: torch.Tensor,
    norms_4N: torch.Tensor,
    target_N: torch.Tensor,
    spec: DivergenceSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A shard's part of every sum over the vocabulary, [7, N], whose sums over shards are the values; and q and u,
    [N, S] each, from which `logit_gradient` goes on.

    Args:
        norms_4N: student max, student log-sum, teacher max, teacher log-sum.
        target_N: column of the target token in this shard, -1 where another shard has it.

    Rows: divergence, K, student entropy, teacher entropy, acceptance rate sum min(p, q), number of ids that are the top
    of both models, and the target's shifted logit (z_target - max).
    """
    log_q = log_probabilities(student_NS, norms_4N[0], norms_4N[1])
    log_p = log_probabilities(teacher_NS, norms_4N[2], norms_4N[3])
    q, p = log_q.exp(), log_p.exp()
    f, u = divergence_terms(log_q, log_p, q, p, spec)
    target = log_q.gather(1, target_N.clamp_min(0)[:, None])[:, 0] + norms_4N[1]
    is_top = (student_NS == norms_4N[0][:, None]) & (teacher_NS == norms_4N[2][:, None])
    sums = (
        f.sum(-1),
        u.sum(-1),
        -log_q.mul_(q).sum(-1),
        -log_p.mul_(p).sum(-1),
        torch.minimum(p, q).sum(-1),
        is_top.any(-1).to(q.dtype),
        torch.where(target_N >= 0, target, 0.0),
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
    spec: DivergenceSpec,
) -> torch.Tensor:
    """Gradient of sum_N (weight * divergence + sft_weight * nll) for the logits before the temperature, [N, S].

    Args:
        k_N: K summed over all shards. The shard's own K gives a wrong gradient under a right loss.
        raw_scale_N: turns q^temperature into the softmax at temperature 1.
    """
    gradient = (u_NS - q_NS * k_N[:, None]).mul_((weight_N / spec.temperature)[:, None])
    if spec.sft_weight:
        raw_q = q_NS**spec.temperature * raw_scale_N[:, None]
        gradient = gradient + raw_q * sft_weight_N[:, None]
        hit_N = torch.where(target_N >= 0, sft_weight_N, 0.0)
        gradient = gradient.scatter_add(1, target_N.clamp_min(0)[:, None], -hit_N[:, None])
    return gradient

"""The divergences: one table of them, with a definition to read and the terms that the stream computes with.

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

A new kind is a name in `engine.config.DIVERGENCE_KINDS` and an entry of `DIVERGENCES`; the tests go over all of them.

Sources: generalized JSD, arXiv 2306.13649 section 3; skew divergences, DistiLLM, arXiv 2402.03898.

Shapes: N tokens, V vocabulary, S vocabulary columns of one shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.config import DIVERGENCE_KINDS

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
        label_smoothing: share of that likelihood's target that is spread evenly over the vocabulary, as in
            arXiv 1512.00567 section 7.
    """

    kind: str = "jsd"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    token_clip: float | None = None
    sft_weight: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            object.__setattr__(self, "kind", "forward_kl" if self.beta == 0.0 else "reverse_kl")
        if self.kind not in DIVERGENCES:
            raise ValueError(f"divergence kind {self.kind!r}: must be one of {', '.join(DIVERGENCES)}")


Terms = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """A kind of divergence.

    Attributes:
        definition: log_p, log_q, spec -> f of every id, [N, V] in nats, with ordinary autograd; the inputs are -inf
            where both are masked.
        terms: log_q, log_p, q, p, spec -> f and u of the table above, element-wise, in fp32; LOG_ZERO where masked.
    """

    definition: Callable[[torch.Tensor, torch.Tensor, DivergenceSpec], torch.Tensor]
    terms: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, DivergenceSpec], Terms]


def dense_divergence(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, spec: DivergenceSpec
) -> torch.Tensor:
    """Per-token divergence in nats, [N], by the definition and with ordinary autograd: the readable reference.

    Any float dtype; ids masked to -inf on both sides are allowed. `token_clip` applies, `sft_weight` does not.
    """
    divergence_N = dense_terms(student_logits_NV, teacher_logits_NV, spec).sum(-1)
    return divergence_N if spec.token_clip is None else divergence_N.clamp(max=spec.token_clip)


def dense_terms(student_logits: torch.Tensor, teacher_logits: torch.Tensor, spec: DivergenceSpec) -> torch.Tensor:
    """What every id adds to its token's divergence, in nats, in the shape of the logits, [..., V]."""
    log_q = torch.log_softmax(student_logits / spec.temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / spec.temperature, dim=-1)
    return DIVERGENCES[spec.kind].definition(log_p, log_q, spec)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """The terms of KL(a||b); those with a = 0 are zero, in the gradient too."""
    live = log_a > -math.inf
    log_ratio = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return torch.where(live, log_a, LOG_ZERO).exp() * log_ratio


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, weight_a: float) -> torch.Tensor:
    """log(weight_a a + (1 - weight_a) b), with -inf masks kept out of the gradient."""
    if weight_a == 0.0:
        return log_b
    live = (log_a > -math.inf) | (log_b > -math.inf)
    safe_a, safe_b = (torch.where(live, x, 0.0) for x in (log_a, log_b))
    mixed = torch.logaddexp(safe_a + math.log(weight_a), safe_b + math.log1p(-weight_a))
    return torch.where(live, mixed, -math.inf)


def log_mixture(a: torch.Tensor, b: torch.Tensor, weight_a: float) -> torch.Tensor:
    """log(weight_a a + (1 - weight_a) b). Where both are below 1e-38 the logarithm is that of 1e-38: it only ever
    multiplies one of the two."""
    return torch.lerp(b, a, weight_a).clamp_min_(SMALLEST).log_()


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, spec: DivergenceSpec) -> torch.Tensor:
    log_m = _log_mixture(log_p, log_q, spec.beta)
    return spec.beta * _kl(log_p, log_m) + (1 - spec.beta) * _kl(log_q, log_m)


def _jsd_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    log_m = log_mixture(p, q, spec.beta)
    u = (log_q - log_m).mul_(q).mul_(1 - spec.beta)
    return (log_p - log_m).mul_(p).mul_(spec.beta).add_(u), u


def _forward_kl_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    return p * (log_p - log_q), -p


def _reverse_kl_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    f = q * (log_q - log_p)
    return f, f


def _skew_forward_kl_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    if spec.alpha == 0.0:
        return _forward_kl_terms(log_q, log_p, q, p, spec)
    log_m = log_mixture(p, q, spec.alpha)
    return p * (log_p - log_m), (log_p - log_m).exp_().mul_(q).mul_(spec.alpha - 1)


def _skew_reverse_kl_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    if spec.alpha == 0.0:
        return _reverse_kl_terms(log_q, log_p, q, p, spec)
    log_m = log_mixture(q, p, spec.alpha)
    f = q * (log_q - log_m)
    return f, f - (log_q - log_m).exp_().mul_(q).mul_(spec.alpha)


def _total_variation_terms(log_q, log_p, q, p, spec: DivergenceSpec) -> Terms:
    return (p - q).abs() / 2, q * (q - p).sign() / 2


DIVERGENCES = {
    "jsd": Divergence(_jsd, _jsd_terms),
    "forward_kl": Divergence(lambda log_p, log_q, spec: _kl(log_p, log_q), _forward_kl_terms),
    "reverse_kl": Divergence(lambda log_p, log_q, spec: _kl(log_q, log_p), _reverse_kl_terms),
    "skew_forward_kl": Divergence(
        lambda log_p, log_q, spec: _kl(log_p, _log_mixture(log_p, log_q, spec.alpha)), _skew_forward_kl_terms
    ),
    "skew_reverse_kl": Divergence(
        lambda log_p, log_q, spec: _kl(log_q, _log_mixture(log_q, log_p, spec.alpha)), _skew_reverse_kl_terms
    ),
    "total_variation": Divergence(
        lambda log_p, log_q, spec: (log_q.exp() - log_p.exp()).abs() / 2, _total_variation_terms
    ),
}
if DIVERGENCES.keys() != set(DIVERGENCE_KINDS):
    raise ImportError(f"DIVERGENCES and DIVERGENCE_KINDS differ: {sorted(DIVERGENCES.keys() ^ set(DIVERGENCE_KINDS))}")

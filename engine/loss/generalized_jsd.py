"""The generalized JSD of whole logits with the arguments of TRL's `GKDTrainer.generalized_jsd_loss`, for scripts.

The engine itself never forms whole logits (`vocab_parallel`); this wraps the dense reference.
"""

from __future__ import annotations

import torch

from engine.loss.divergence import DivergenceSpec, dense_terms

IGNORED = -100  # the label of a position that is not scored
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence, arXiv 2306.13649 equation 1, in nats; names and figures are TRL 1.16's.

    Args:
        student_logits, teacher_logits: [..., V], already shifted: the logits of a position score its own label.
        labels: [...]; positions with -100 are left out.
        beta: weight of the teacher in the mixture; 0 is KL(teacher || student), 1 is KL(student || teacher).
        temperature: divides both logits.
        reduction: `batchmean` divides the sum by the positions that are scored (without labels: by the size of the
            first dimension), `mean` by their number times V; `sum`; `none` gives the terms, [..., V], or [N, V] of the
            N scored positions.
        num_items_in_batch: what the sum is divided by, whatever `reduction` says.

    Raises:
        ValueError: for logits of different shapes, another reduction, or a beta outside [0, 1].
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}: must have "
            "the same shape"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: must be one of {', '.join(REDUCTIONS)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta!r}: must be in [0, 1]")
    terms = dense_terms(student_logits, teacher_logits, DivergenceSpec("jsd", float(beta), temperature=temperature))
    num_scored = max(terms.shape[0], 1)
    if labels is not None:
        terms = terms[labels != IGNORED]
        num_scored = max(terms.shape[0], 1)
    if num_items_in_batch is not None:
        return terms.sum() / num_items_in_batch
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum() / (num_scored if reduction == "batchmean" else 1)

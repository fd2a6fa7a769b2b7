"""`generalized_jsd_loss`: the properties that TRL asks of its own, against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from engine import GKDTrainer
from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.generalized_jsd import IGNORED, generalized_jsd_loss

BATCH, LENGTH, VOCAB = 3, 4, 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH, LENGTH, VOCAB, generator=generator, dtype=torch.float64) * 3
    return student, teacher


def textbook(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Every id's term on probabilities: equation 1 of arXiv 2306.13649, a KL at the ends."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if beta == 0:
        return p * (p / q).log()
    if beta == 1:
        return q * (q / p).log()
    mixture = beta * p + (1 - beta) * q
    return beta * p * (p / mixture).log() + (1 - beta) * q * (q / mixture).log()


def test_it_is_the_trainers():
    assert GKDTrainer.generalized_jsd_loss is generalized_jsd_loss


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1.0])
def test_uniform_distributions_have_no_divergence(beta):
    flat = torch.full((BATCH, LENGTH, VOCAB), 0.3, dtype=torch.float64)
    assert generalized_jsd_loss(flat, flat + 2, beta=beta).item() == pytest.approx(0, abs=1e-15)


def test_two_tokens_by_hand():
    """p = (2/3, 1/3) against q = (1/3, 2/3): KL is log(2)/3, and the JSD takes m = (1/2, 1/2)."""
    teacher, student = torch.tensor([[math.log(2.0), 0.0]]), torch.tensor([[0.0, math.log(2.0)]])
    half = (2 / 3) * math.log(4 / 3) + (1 / 3) * math.log(2 / 3)
    for beta, expected in ((0.0, math.log(2) / 3), (1.0, math.log(2) / 3), (0.5, half)):
        assert generalized_jsd_loss(student, teacher, beta=beta).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_reductions_and_shapes(logits, beta):
    student, teacher = logits
    terms = textbook(student, teacher, beta)
    for reduction, expected in (
        ("none", terms),
        ("sum", terms.sum()),
        ("mean", terms.mean()),
        ("batchmean", terms.sum() / BATCH),
    ):
        torch.testing.assert_close(generalized_jsd_loss(*logits, beta=beta, reduction=reduction), expected)
    torch.testing.assert_close(
        generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1),
        dense_divergence(student, teacher, DivergenceSpec("jsd", beta)),
    )


def test_labels_choose_the_positions(logits):
    labels = torch.full((BATCH, LENGTH), IGNORED)
    labels[0, 1], labels[2, 3], labels[2, 2] = 5, 0, 1
    scored = textbook(*logits, 0.5)[[0, 2, 2], [1, 2, 3]]
    torch.testing.assert_close(generalized_jsd_loss(*logits, labels=labels, reduction="none"), scored)
    torch.testing.assert_close(generalized_jsd_loss(*logits, labels=labels), scored.sum() / 3)
    torch.testing.assert_close(generalized_jsd_loss(*logits, labels=labels, reduction="mean"), scored.mean())
    for count in (12, torch.tensor(12)):
        for reduction in ("batchmean", "sum", "none"):
            loss = generalized_jsd_loss(*logits, labels, num_items_in_batch=count, reduction=reduction)
            torch.testing.assert_close(loss, scored.sum() / 12)


def test_nothing_scored_is_zero_with_a_gradient(logits):
    student = logits[0].clone().requires_grad_()
    loss = generalized_jsd_loss(student, logits[1], labels=torch.full((BATCH, LENGTH), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_temperature_divides_both(logits):
    student, teacher = logits
    at_two = generalized_jsd_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(at_two, generalized_jsd_loss(student / 2, teacher / 2))
    assert at_two < generalized_jsd_loss(student, teacher)


def test_the_middle_is_symmetric(logits):
    student, teacher = logits
    torch.testing.assert_close(generalized_jsd_loss(student, teacher), generalized_jsd_loss(teacher, student))
    torch.testing.assert_close(
        generalized_jsd_loss(student, teacher, beta=0.2), generalized_jsd_loss(teacher, student, beta=0.8)
    )


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_identical_logits_have_neither_loss_nor_gradient(logits, beta):
    student = logits[0].clone().requires_grad_()
    loss = generalized_jsd_loss(student, logits[0], beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-15


def test_extreme_logits_stay_finite():
    student, teacher = torch.tensor([[[1e4, -1e4, 0.0]]]), torch.tensor([[[-1e4, 1e4, 0.0]]])
    assert generalized_jsd_loss(student, teacher).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"reduction": "avg"}, "batchmean, sum, mean, none"), ({"beta": 1.5}, "in \\[0, 1\\]")],
    ids=str,
)
def test_what_cannot_be_is_refused(logits, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        generalized_jsd_loss(*logits, **change)
    with pytest.raises(ValueError, match="the same shape"):
        generalized_jsd_loss(logits[0], logits[1][..., :5])

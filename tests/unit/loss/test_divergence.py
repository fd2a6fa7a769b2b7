"""The maths of the divergences: the dense reference against definitions, the stream against it where it is hard."""

from __future__ import annotations

import math

import pytest
import torch

from engine.config import DIVERGENCE_KINDS
from engine.loss.divergence import DIVERGENCES, LOG_ZERO, DivergenceSpec, dense_divergence
from engine.loss.head import HeadShard, VocabLayout
from engine.loss.signal import HiddenSignal
from engine.loss.values import TokenValues
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence


def stream_over_logits(groups, student_NV, teacher_NV, spec, chunk_bytes=2**22):
    """The stream on given logits: hidden states are the logits and the head is the identity."""
    vocab = student_NV.shape[1]
    eye, none = torch.eye(vocab), torch.empty(0, dtype=torch.long)
    student, teacher = (HeadShard(eye, None, none, 1.0, None, torch.zeros(vocab, vocab)) for _ in range(2))
    hidden = student_NV.clone().requires_grad_()
    count = student_NV.shape[0]
    targets = torch.arange(count) % vocab
    stream = Stream(groups, torch.arange(vocab), chunk_bytes, num_ids=vocab)
    loss, values = vocab_parallel_divergence(
        hidden, HiddenSignal(teacher_NV, teacher), student, targets, torch.ones(count), count, spec, stream
    )
    loss.backward()
    return loss.item(), hidden.grad, values


def dense_in_double(student_NV, teacher_NV, spec):
    z = student_NV.detach().clone().double().requires_grad_()
    loss = dense_divergence(z, teacher_NV.detach().double(), spec).sum()
    loss.backward()
    return loss.item(), z.grad


def relative(a, b) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


# Each kind as the textbooks have it, on probabilities; w is beta or alpha.
TEXTBOOK = {
    "jsd": lambda p, q, w: w * kl(p, w * p + (1 - w) * q) + (1 - w) * kl(q, w * p + (1 - w) * q),
    "forward_kl": lambda p, q, w: kl(p, q),
    "reverse_kl": lambda p, q, w: kl(q, p),
    "skew_forward_kl": lambda p, q, w: kl(p, w * p + (1 - w) * q),
    "skew_reverse_kl": lambda p, q, w: kl(q, (1 - w) * p + w * q),
    "total_variation": lambda p, q, w: (p - q).abs().sum(-1) / 2,
}


@pytest.mark.parametrize("kind", sorted({*DIVERGENCE_KINDS, *DIVERGENCES}))
def test_definition_and_terms_are_the_textbooks(kind):
    """Value and gradient of the definition, and of the stream's f and u, against the textbook under autograd."""
    torch.manual_seed(0)
    z, t = (torch.randn(9, 31, dtype=torch.float64, requires_grad=True) for _ in range(2))
    spec = DivergenceSpec(kind, beta=0.3, alpha=0.3)
    expected_N = TEXTBOOK[kind](torch.softmax(t, -1), torch.softmax(z, -1), 0.3)
    (expected_grad,) = torch.autograd.grad(expected_N.sum(), z)
    defined_N = dense_divergence(z, t.detach(), spec)
    (defined_grad,) = torch.autograd.grad(defined_N.sum(), z)
    log_q, log_p = torch.log_softmax(z.detach(), -1), torch.log_softmax(t.detach(), -1)
    f, u = DIVERGENCES[kind].terms(log_q, log_p, log_q.exp(), log_p.exp(), spec)
    gradient = u - log_q.exp() * u.sum(-1, keepdim=True)
    for values in (defined_N, f.sum(-1)):
        torch.testing.assert_close(values, expected_N, rtol=1e-12, atol=1e-14)
    for grads in (defined_grad, gradient):
        torch.testing.assert_close(grads, expected_grad, rtol=1e-12, atol=1e-14)


def test_every_kind_of_the_configuration_has_an_entry():
    assert DIVERGENCES.keys() == set(DIVERGENCE_KINDS) == TEXTBOOK.keys()
    assert len({id(entry.terms) for entry in DIVERGENCES.values()}) == len(DIVERGENCES)


def test_ends_and_clip():
    torch.manual_seed(0)
    z, t = (torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(
            dense_divergence(z, t, DivergenceSpec("jsd", beta=beta)), dense_divergence(z, t, DivergenceSpec(kind))
        )
    for kind in ("forward_kl", "reverse_kl"):
        plain, skewed = DivergenceSpec(kind), DivergenceSpec(f"skew_{kind}", alpha=0.0)
        assert torch.equal(dense_divergence(z, t, skewed), dense_divergence(z, t, plain))
        log_q, log_p = torch.log_softmax(z, -1).clamp_min(LOG_ZERO), torch.log_softmax(t, -1)
        terms = [DIVERGENCES[s.kind].terms(log_q, log_p, log_q.exp(), log_p.exp(), s) for s in (plain, skewed)]
        assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))
    assert dense_divergence(z, t, DivergenceSpec("jsd", beta=0.3, token_clip=0.01)).max() == 0.01


def test_jsd_scale_near_equality():
    """|gradient| of JSD(beta) is beta (1 - beta) that of a KL where p is close to q."""
    z = torch.randn(4, 50, dtype=torch.float64)
    t = z + 1e-4 * torch.randn_like(z)
    _, kl = dense_in_double(z, t, DivergenceSpec("forward_kl"))
    for beta in (0.1, 0.5, 0.9):
        _, jsd = dense_in_double(z, t, DivergenceSpec("jsd", beta=beta))
        assert (jsd.norm() / kl.norm()).item() == pytest.approx(beta * (1 - beta), rel=1e-3)


def specs() -> list[DivergenceSpec]:
    return [DivergenceSpec(kind, beta=0.3, alpha=0.2, temperature=t) for kind in DIVERGENCE_KINDS for t in (0.7, 1.0)]


@pytest.mark.parametrize("spec", specs(), ids=str)
@pytest.mark.parametrize("case", ["large", "one-hot teacher", "masked ids", "identical"])
def test_extremes(alone, spec, case):
    torch.manual_seed(0)
    z, t = torch.randn(6, 97), torch.randn(6, 97)
    if case == "large":
        z, t = z * 1e4, t * 1e4
    elif case == "one-hot teacher":
        t = torch.full_like(t, -1e4)
        t[range(6), range(6)] = 1e4
    elif case == "masked ids":
        z[:, 5:20], t[:, 5:20] = -math.inf, -math.inf
    else:
        t = z.clone()
    if case == "masked ids":  # masks come after the head, from a bias of -inf
        loss, gradient = masked_stream(alone, z, t, spec)
    else:
        loss, gradient, _ = stream_over_logits(alone, z, t, spec)
    expected_loss, expected = dense_in_double(z, t, spec)
    assert math.isfinite(loss) and gradient.isfinite().all()
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
    # a log-ratio of 2e4 has an fp32 rounding of 2e-3, which a reverse KL's gradient carries
    largest = (z.double().clamp_min(-1e5) - t.double().clamp_min(-1e5)).abs().max().item() / spec.temperature
    assert (gradient - expected).abs().max() < 1e-5 + torch.finfo(torch.float32).eps * largest


def masked_stream(groups, z, t, spec):
    vocab = z.shape[1]
    bias = torch.where(z[0].isinf(), -math.inf, 0.0)
    none = torch.empty(0, dtype=torch.long)
    student, teacher = (HeadShard(torch.eye(vocab), bias, none, 1.0, None, torch.zeros(vocab, vocab)) for _ in range(2))
    hidden = torch.where(z.isinf(), 0.0, z).requires_grad_()
    stream = Stream(groups, torch.arange(vocab), 2**22)
    args = (torch.arange(6), torch.ones(6), 6, spec, stream)
    signal = HiddenSignal(torch.where(t.isinf(), 0.0, t), teacher)
    loss, _ = vocab_parallel_divergence(hidden, signal, student, *args)
    loss.backward()
    return loss.item(), hidden.grad


@pytest.mark.lengthy
def test_vocabulary_of_262144(alone):
    """A Gemma-sized vocabulary through a real head, in several chunks."""
    torch.manual_seed(0)
    vocab, hidden_size, spec = 262_144, 64, DivergenceSpec("jsd", beta=0.3)
    weights = [torch.randn(vocab, hidden_size) / 3 for _ in range(2)]
    hidden, teacher_hidden = torch.randn(5, hidden_size), torch.randn(5, hidden_size)
    none = torch.empty(0, dtype=torch.long)
    student = HeadShard(weights[0], None, none, 1.0, None, torch.zeros(vocab, hidden_size))
    teacher = HeadShard(weights[1], None, none, 1.0, None)
    leaf = hidden.clone().requires_grad_()
    stream = Stream(alone, torch.arange(vocab), 2 * 8 * vocab)
    loss, _ = vocab_parallel_divergence(
        leaf, HiddenSignal(teacher_hidden, teacher), student, torch.arange(5), torch.ones(5), 5, spec, stream
    )
    loss.backward()
    exact_loss, exact_hidden, exact_head = dense_head_gradients(torch.float64, hidden, teacher_hidden, weights, spec)
    _, rough_hidden, rough_head = dense_head_gradients(torch.float32, hidden, teacher_hidden, weights, spec)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    # The sum over so many ids cancels to little: whole fp32 logits and torch's log_softmax leave 3e-4 here.
    assert relative(leaf.grad, exact_hidden) < 3e-5 < relative(rough_hidden, exact_hidden)
    assert relative(student.grad_SH, exact_head) < 1e-5 < relative(rough_head, exact_head)


def dense_head_gradients(dtype, hidden, teacher_hidden, weights, spec):
    leaf, weight = (x.clone().to(dtype).requires_grad_() for x in (hidden, weights[0]))
    loss = dense_divergence(leaf @ weight.t(), teacher_hidden.to(dtype) @ weights[1].to(dtype).t(), spec).sum()
    loss.backward()
    return loss, leaf.grad, weight.grad


@pytest.mark.parametrize("kind", DIVERGENCE_KINDS)
def test_near_convergence_with_bf16_weights(alone, kind):
    """A teacher a small step away from the student, bf16 weights and hidden states. Logits kept in fp32 leave less
    than 1e-2 of gradient error; the same logits rounded to bf16 leave more than 5e-2."""
    torch.manual_seed(0)
    vocab, hidden_size, count = 2048, 64, 32
    weight = (torch.randn(vocab, hidden_size) / 8).bfloat16()
    hidden = torch.randn(count, hidden_size).bfloat16()
    teacher_hidden = (hidden.float() + 0.01 * torch.randn(count, hidden_size)).bfloat16()
    spec = DivergenceSpec(kind, beta=0.5, alpha=0.1)
    z, t = hidden.double() @ weight.double().t(), teacher_hidden.double() @ weight.double().t()
    _, exact_logit_grad = dense_in_double(z, t, spec)
    exact = exact_logit_grad @ weight.double()

    shard = HeadShard(weight.float(), None, torch.empty(0, dtype=torch.long), 1.0, None)
    leaf = hidden.clone().requires_grad_()
    stream = Stream(alone, torch.arange(vocab), 2**22)
    args = (torch.arange(count), torch.ones(count), count, spec, stream)
    loss, _ = vocab_parallel_divergence(leaf, HiddenSignal(teacher_hidden, shard), shard, *args)
    loss.backward()
    _, rounded_logit_grad = dense_in_double(z.bfloat16(), t.bfloat16(), spec)
    assert relative(leaf.grad, exact) < 1e-2
    assert relative(rounded_logit_grad @ weight.double(), exact) > 5e-2


def test_values_of_the_sweep(alone):
    torch.manual_seed(0)
    z, t = 2 * torch.randn(7, 50), 2 * torch.randn(7, 50)
    t[0] = z[0]
    spec = DivergenceSpec("jsd", beta=0.5, temperature=0.7, sft_weight=1.0, label_smoothing=0.1)
    _, _, values = stream_over_logits(alone, z, t, spec)
    q, p = (torch.softmax(x.double() / 0.7, -1) for x in (z, t))
    nll = torch.nn.functional.cross_entropy(z.double(), torch.arange(7), reduction="none")
    expected = {
        "divergence": dense_divergence(z.double(), t.double(), DivergenceSpec("jsd", beta=0.5, temperature=0.7)),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "acceptance": torch.minimum(p, q).sum(-1),
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double(),
        "nll": nll,  # of the target at temperature 1
        "uniform_nll": -torch.log_softmax(z.double(), -1).mean(-1),
    }
    assert TokenValues._fields == tuple(expected)
    for name, value in values._asdict().items():
        assert value.tolist() == pytest.approx(expected[name].tolist(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "num_rows,row_size,world,group", [(12, 5, 4, 2), (1001, 3, 4, 4), (9, 1, 8, 2), (13, 7, 3, 1), (8, 4, 8, 8)]
)
def test_vocab_layout_covers_every_row_once(num_rows, row_size, world, group):
    layout = VocabLayout(num_rows, row_size, world, group)
    for first in range(0, world, group):  # each token group covers the vocabulary
        ids = torch.cat([layout.shard_ids(rank) for rank in range(first, first + group)])
        assert sorted(ids[ids >= 0].tolist()) == list(range(num_rows))
        assert len({layout.shard_ids(rank).numel() for rank in range(world)}) == 1
    for rank in range(world):
        start, stop = layout.rows_of_piece(rank)
        assert all(
            rank * layout.piece_size <= row * row_size < (rank + 1) * layout.piece_size for row in range(start, stop)
        )


def test_vocab_layout_refuses():
    with pytest.raises(ValueError, match="must divide"):
        VocabLayout(100, 4, 4, 3)
    with pytest.raises(ValueError, match="cannot be cut"):
        VocabLayout(3, 4, 4, 1)


def test_unknown_kind():
    with pytest.raises(ValueError, match="must be one of jsd"):
        DivergenceSpec("kl")

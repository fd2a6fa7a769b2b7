"""The streamed divergence on ZeRO-3 partitions equals the dense one in float64: loss, gradients, norm, weights."""

from __future__ import annotations

import dataclasses

import deepspeed
import pytest
import torch
import torch.distributed as dist

from engine.data.batch import pack
from engine.loss import vocab_parallel
from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.projection import project
from engine.loss.vocab_parallel import vocab_parallel_divergence
from tests.library.families import CONFIGS
from tests.library.steps import Case, build_case, ragged_samples, train_step

SPECS = [DivergenceSpec("jsd", beta=b, temperature=t) for b in (0.0, 0.1, 0.5, 0.9, 1.0) for t in (0.7, 1.0, 2.0)] + [
    DivergenceSpec("skew_forward_kl", alpha=0.1),
    DivergenceSpec("skew_forward_kl", alpha=0.0),
    DivergenceSpec("skew_reverse_kl", alpha=0.3, temperature=0.7),
    DivergenceSpec("total_variation"),
    DivergenceSpec("jsd", beta=0.3, token_clip=0.265),
    DivergenceSpec("reverse_kl", temperature=2.0, sft_weight=0.5),
    DivergenceSpec("jsd", beta=0.3, temperature=0.7, sft_weight=0.5, label_smoothing=0.2),
]


def dense_step(case: Case, reference, spec: DivergenceSpec, world_size: int) -> torch.Tensor:
    """The same loss from whole logits in float64, all ranks' samples in one process; gradients in `.grad`."""
    student, teacher = reference
    shared = min(case.vocab_size, case.teacher_vocab_size)
    terms = []
    for rank in range(world_size):
        for micro in range(case.accumulation):
            for sample in ragged_samples(rank, micro, shared):
                ids = torch.tensor([sample.input_ids])
                keep = torch.tensor(sample.response_mask[1:])
                z = student(ids).logits[0, :-1][keep][:, :shared]
                with torch.no_grad():
                    t = teacher(ids).logits[0, :-1][keep][:, :shared]
                nll = torch.nn.functional.cross_entropy(
                    z, ids[0, 1:][keep], reduction="none", label_smoothing=spec.label_smoothing
                )
                terms.append(dense_divergence(z, t, spec) + spec.sft_weight * nll)
    loss = torch.cat(terms).mean()
    student.zero_grad()
    loss.backward()
    return loss.detach()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


def check_gradients(case: Case, specs: list[DivergenceSpec]) -> list[tuple]:
    """Relative errors of loss, every parameter's gradient (worst), head gradient and norm, for each spec."""
    parts = build_case(case)
    student, reference = parts[0], parts[3]
    named = dict(reference[0].named_parameters())
    head = reference[0].get_output_embeddings().weight
    norms_head = next(name for name, param in named.items() if param is head)
    rows = []
    for spec in specs:
        loss = train_step(case, parts, spec)
        expected = dense_step(case, reference, spec, dist.get_world_size())
        errors = {}
        for name, param in student.model.named_parameters():
            gradient = deepspeed.utils.safe_get_full_grad(param)
            errors[name] = relative(gradient, named[name].grad)
        student.engine.step()
        norm = torch.cat([p.grad.flatten() for p in named.values()]).norm().item()
        worst = max(errors, key=errors.get)
        rows.append(
            (
                spec,
                abs(loss - expected.item()) / expected.item(),
                worst,
                errors[worst],
                errors[norms_head],
                abs(student.grad_norm - norm) / norm,
            )
        )
    student.engine.destroy()
    return rows


def assert_close(rows: list[tuple]) -> None:
    # fp32 against float64: the arithmetic itself leaves about 1e-6
    for spec, loss_error, worst, worst_error, head_error, norm_error in rows:
        assert loss_error < 1e-5, (spec, "loss", loss_error)
        assert worst_error < 1e-5, (spec, worst, worst_error)
        assert head_error < 1e-5, (spec, "head", head_error)
        assert norm_error < 1e-5, (spec, "norm", norm_error)


@pytest.mark.parametrize("world_size,group_size", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_kind_equals_dense(ranks, world_size, group_size):
    for rows in ranks(world_size).run(check_gradients, Case(group_size), SPECS):
        assert_close(rows)


VARIANTS = [
    Case(2, tied=True),
    Case(2, accumulation=3),
    Case(2, tied=True, accumulation=3, offload=True),
    Case(2, offload=True),
    Case(1, tied=True, accumulation=3),
    Case(2, vocab_size=1000, teacher_vocab_size=1013),
    Case(2, vocab_size=1013, teacher_vocab_size=1000, tied=True),
    Case(2, chunk_bytes=1),
    Case(2, chunk_bytes=10**9),
]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants_equal_dense(ranks, world_size, case):
    for rows in ranks(world_size).run(
        check_gradients,
        case,
        [DivergenceSpec("jsd", beta=0.3), DivergenceSpec("reverse_kl", temperature=2.0), SPECS[-1]],
    ):
        assert_close(rows)


@pytest.mark.parametrize("family", ["phi", "gemma2", "gemma3_text", "granite", "cohere", "gpt2"])
def test_heads_with_bias_scale_or_soft_cap(ranks, family):
    """Phi has a bias, Gemma a soft cap and tied weights, Granite and Cohere a scale, GPT-2 learned positions."""
    tied = CONFIGS[family].tie_word_embeddings
    case = Case(2, 97, 97, tied=tied, family=family)
    for rows in ranks(4).run(
        check_gradients, case, [DivergenceSpec("jsd", beta=0.3), DivergenceSpec("forward_kl", temperature=0.7)]
    ):
        assert_close(rows)


def check_weights_after_steps(case: Case, num_steps: int) -> float:
    """Relative difference to dense AdamW in float64 after some steps, over all parameters."""
    parts = build_case(case, learning_rate=1e-2)
    student, reference = parts[0], parts[3]
    spec = DivergenceSpec("jsd", beta=0.3)
    model = reference[0]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(num_steps):
        train_step(case, parts, spec)
        student.engine.step()
        dense_step(case, reference, spec, dist.get_world_size())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    ours = []
    for param in student.model.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            ours.append(param.detach().double().flatten().clone())
    student.engine.destroy()
    theirs = torch.cat([p.detach().flatten() for p in model.parameters()])
    return relative(torch.cat(ours), theirs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_after_five_steps(ranks, world_size):
    cases = [Case(world_size, tied=True, accumulation=3), Case(1), Case(world_size, offload=True)]
    for case in cases:
        # AdamW divides by sqrt(v): fp32 noise in near-zero gradients moves those weights by up to lr
        assert max(ranks(world_size).run(check_weights_after_steps, case, 5)) < 1e-4, case


def check_against_deepspeed(temperature: float) -> list[tuple[float, float]]:
    """Relative difference of values and hidden gradients to DeepSpeed's KL over this layout's logits."""
    from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_kl_div

    case = Case(dist.get_world_size())
    parts = build_case(case)
    student, teacher, stream, _ = parts
    batch = pack(
        ragged_samples(0, 0, case.vocab_size), "cpu"
    )  # every rank has the same tokens, as DeepSpeed's op expects
    weights = torch.ones(batch.num_response_tokens)
    rows = []
    for reverse, kind in ((False, "forward_kl"), (True, "reverse_kl")):
        shard = student.open_step(train=True)
        hidden = student.hidden(batch).detach().requires_grad_()
        (signal,) = teacher.signals([batch])
        spec = DivergenceSpec(kind, temperature=temperature)
        loss, values = vocab_parallel_divergence(
            hidden, signal, shard, batch.target_ids_N, weights, len(weights), spec, stream
        )
        (ours,) = torch.autograd.grad(loss, hidden)
        z = project(hidden, shard) / temperature
        t = project(signal.hidden_NH, signal.head) / temperature
        z = z.detach().requires_grad_()
        kl = vocab_parallel_kl_div(z, t, reverse=reverse, tp_group=stream.groups.tokens)
        (logit_grad,) = torch.autograd.grad(kl.sum(), z)
        theirs = (logit_grad / temperature) @ shard.weight_SH
        dist.all_reduce(theirs)
        rows.append((relative(values.divergence, kl.double().detach()), relative(ours, theirs.double())))
        student.head.shard = None
    student.engine.destroy()
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_kl_equals_deepspeeds(ranks, world_size):
    for rows in ranks(world_size).run(check_against_deepspeed, 1.5):
        for value_error, gradient_error in rows:
            assert value_error < 1e-5 and gradient_error < 1e-5


def check_mutant(case: Case) -> list[tuple]:
    """`check_gradients` with the second reduction left out."""
    original = vocab_parallel._Sweep._sum_over_shards
    vocab_parallel._Sweep._sum_over_shards = lambda self, sums: sums
    try:
        return check_gradients(case, [DivergenceSpec("reverse_kl"), DivergenceSpec("jsd", beta=0.3)])
    finally:
        vocab_parallel._Sweep._sum_over_shards = original


def test_leaving_out_the_second_reduction_is_caught(ranks):
    for rows in ranks(2).run(check_mutant, Case(2)):
        with pytest.raises(AssertionError):
            assert_close(rows)
        for _, _, _, worst_error, head_error, _ in rows:
            assert worst_error > 1e-2 and head_error > 1e-2  # the gradient itself is off, not only the value


def check_compiled(case: Case) -> list[float]:
    """Relative differences of compiled and eager loss, hidden gradient and head gradient."""
    results = []
    for compiled in (False, True):
        parts = build_case(dataclasses.replace(case, compiled=compiled))
        loss = train_step(case, parts, DivergenceSpec("jsd", beta=0.3, sft_weight=0.1, temperature=0.8))
        gradients = [deepspeed.utils.safe_get_full_grad(p).flatten() for p in parts[0].model.parameters()]
        parts[0].engine.step()
        parts[0].engine.destroy()
        results.append((torch.tensor([loss]), torch.cat(gradients)))
    return [relative(a, b.double()) for a, b in zip(*results, strict=True)]


def test_compiled_equals_eager(ranks):
    assert max(ranks(1).run(check_compiled, Case(1), deadline_s=400)[0]) < 1e-6

"""What training adds to the student's forward: NEFTune's noise, and the balance of a mixture of experts."""

from __future__ import annotations

import math

import deepspeed
import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig

from engine import GKDConfig
from engine.cluster.collectives import build_vocab_groups
from engine.data.batch import Sample, pack
from engine.models.regularizers import EmbeddingNoise, RouterBalance
from engine.models.student import build_student
from tests.library.models import build, tiny_llama
from tests.library.runs import assert_same_run, metrics_of, train, weights_of, write_run_inputs

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1),
}


def sequence(seed: int, length: int, index: int) -> Sample:
    ids = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(ids[:2], ids, [False] * 2 + [True] * (length - 2), index)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    fields = write_run_inputs(tmp_path_factory.mktemp("regularizers"))
    return fields | {"global_batch_size": 4, "lmbda": 0.5, "seed": 3}


@torch.no_grad()
def test_noise_is_as_large_as_the_paper_has_it_and_its_sequences_own():
    model, samples = tiny_llama(64), [sequence(1, 9, index=5), sequence(2, 14, index=2)]
    embeddings = model.get_input_embeddings()
    noise, together = EmbeddingNoise(embeddings, alpha=5.0, seed=7), pack(samples, "cpu")
    plain = embeddings(together.input_ids_T[None])
    with noise.over(together, step=3):
        first = embeddings(together.input_ids_T[None]) - plain
    for start, sample in ((0, samples[0]), (9, samples[1])):
        length = len(sample.input_ids)
        own, alone = first[0, start : start + length], pack([sample], "cpu")
        bound = 5.0 / math.sqrt(length * 16)
        assert own.abs().max() <= bound * 1.0001 and own.abs().mean() == pytest.approx(bound / 2, rel=0.2)
        with noise.over(alone, step=3):
            torch.testing.assert_close(embeddings(alone.input_ids_T) - embeddings.weight[alone.input_ids_T], own)
        with noise.over(alone, step=4):
            assert (embeddings(alone.input_ids_T) - embeddings.weight[alone.input_ids_T] - own).abs().max() > bound / 4
    assert torch.equal(embeddings(together.input_ids_T[None]), plain)  # outside there is none


def test_noise_does_not_depend_on_ranks_or_accumulation(ranks, inputs, tmp_path):
    runs = []
    for world_size, per_device, alpha in ((1, 4, 5.0), (1, 2, 5.0), (2, 1, 5.0), (1, 4, None)):
        fields = inputs | {
            "per_device_train_batch_size": per_device, "neftune_noise_alpha": alpha, "max_steps": 3, "save_steps": None,
            "output_dir": str(tmp_path / f"{world_size}x{per_device}-{alpha}"),
        }  # fmt: skip
        ranks(world_size).run(train, fields)
        runs.append(fields)
    for fields in runs[1:3]:
        assert_same_run(fields, runs[0], tolerance=1e-5)
    plain, noisy = weights_of(runs[3]["output_dir"]), weights_of(runs[0]["output_dir"])
    assert ((plain - noisy).norm() / plain.norm()).item() > 1e-4
    first, other = (metrics_of(fields["output_dir"])[0]["train/divergence"] for fields in (runs[0], runs[3]))
    assert first != pytest.approx(other, rel=1e-4)


def balance_of(family: str, coefficient: float) -> tuple[float, float]:
    """Relative errors of the balance loss and its worst gradient, under ZeRO-3, against the model's own aux_loss; the
    ranks have a sequence each, in two micro-batches on rank 0's side."""
    import torch.distributed as dist

    model, reference = (build(EXPERTS[family], seed=1) for _ in range(2))
    world_size = dist.get_world_size()
    config = GKDConfig(
        bf16=False, per_device_train_batch_size=1, gradient_accumulation_steps=2, router_aux_loss_coef=coefficient,
        gradient_checkpointing=True, max_grad_norm=0.0,
    )  # fmt: skip
    student = build_student(config, model, build_vocab_groups(1, world_size), 64, num_steps=4)
    student.open_step(train=True)
    total = 0.0
    for micro in range(2):
        hidden = student.hidden(pack([sequence(10 * dist.get_rank() + micro, 12, micro)], "cpu"), 0)
        loss = student.router_loss(2)
        student.backward(loss + 0 * hidden.sum(), is_last=micro == 1)
        total += float(loss)
    expected = torch.zeros(())
    for rank in range(world_size):
        for micro in range(2):
            ids = torch.tensor([sequence(10 * rank + micro, 12, micro).input_ids])
            expected = expected + reference(ids, output_router_logits=True).aux_loss * coefficient / (2 * world_size)
    expected.backward()
    summed = torch.tensor(total)
    dist.all_reduce(summed)
    errors = [0.0]
    for (name, param), own in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = deepspeed.utils.safe_get_full_grad(param)
        if own.grad is not None and own.grad.norm() > 1e-8 and "lm_head" not in name:
            errors.append(float((gradient - own.grad).norm() / own.grad.norm()))
    assert len(errors) > 5
    student.engine.destroy()
    return abs(float(summed) - float(expected)) / float(expected), max(errors)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_balance_is_the_models_own(ranks, family, world_size):
    for value_error, gradient_error in ranks(world_size).run(balance_of, family, 0.02):
        assert value_error < 1e-5 and gradient_error < 1e-4


def test_a_model_without_experts_has_no_balance():
    with pytest.raises(ValueError, match="router_aux_loss_coef is set, and it has no load-balancing loss"):
        RouterBalance(tiny_llama(), 0.1)

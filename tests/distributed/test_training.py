"""Whole runs in real process groups: the same result at any world size, accumulation, teacher placement or resume."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from engine import GKDConfig, GKDTrainer
from tests.library.models import build, tiny_llama, tiny_tokenizer
from tests.library.runs import assert_same_run, metrics_of, read_lines, samples_of, train, weights_of, write_run_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    return write_run_inputs(folder) | {"global_batch_size": 8, "lmbda": 0.5, "save_steps": None, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def plain(ranks, inputs, tmp_path_factory) -> tuple[dict, list[dict]]:
    """The run that changes are compared with, on two ranks: its fields, and what each rank says. Read it only."""
    fields = inputs | {"output_dir": str(tmp_path_factory.mktemp("plain") / "run")}
    return fields, ranks(2).run(train, fields)


def test_world_size_and_accumulation_change_nothing(ranks, inputs, tmp_path):
    """8 sequences a step as 1x8, 1x2x4, 2x2x2, 2x1x4, 4x2; half of the steps on-policy."""
    runs = []
    for world_size, per_device in ((1, 8), (1, 2), (2, 2), (2, 1), (4, 2)):
        fields = inputs | {
            "per_device_train_batch_size": per_device,
            "output_dir": str(tmp_path / f"{world_size}x{per_device}"),
        }
        runs.append((fields, ranks(world_size).run(train, fields)))
    on_policy = [line["train/on_policy"] for line in metrics_of(runs[0][0]["output_dir"])]
    assert 0 < sum(on_policy) < len(on_policy)  # the seed gives both kinds of step
    for fields, results in runs[1:]:
        assert samples_of(results) == samples_of(runs[0][1])
        assert_same_run(fields, runs[0][0], tolerance=1e-5)


CHANGES = [
    {"teacher_placement": "replicated"},
    {"teacher_placement": "tensor_parallel", "teacher_tp_size": 2},
    {"deepspeed": "ds_configs/zero3_offload.json"},
    {"vocab_parallel_size": 1},
    {"generation_placement": "partitioned"},
    {"loss_chunk_bytes": 4096},
    {"generation_rows": 2},
    {"gradient_checkpointing": True},
    {"teacher_offload": "between_steps", "teacher_placement": "replicated", "deepspeed": "tests/fused_adam.json"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_placements_and_sizes_change_nothing(ranks, plain, tmp_path, change):
    changed = plain[0] | {"output_dir": str(tmp_path / "changed")} | change
    assert samples_of(ranks(2).run(train, changed)) == samples_of(plain[1])
    assert_same_run(changed, plain[0], tolerance=1e-5)


@pytest.mark.parametrize("extra", [{}, {"rollout_reuse": 2, "lmbda": 0.8, "num_generations": 2}], ids=str)
def test_resume_is_bit_identical(ranks, inputs, tmp_path, extra):
    """Six steps in one go, and three, a checkpoint in mid-epoch, and three more by a fresh trainer: every figure, token
    and weight."""
    fields = inputs | {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "max_samples": 20} | extra
    whole = fields | {"output_dir": str(tmp_path / "whole")}
    uninterrupted = ranks(2).run(train, whole)
    halves = fields | {"output_dir": str(tmp_path / "halves"), "resume_from_checkpoint": "auto"}
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step_6")
    shutil.rmtree(tmp_path / "halves" / "final")
    results = ranks(2).run(train, halves)
    assert [r["seen"] for r in results] == [r["seen"][3:] for r in uninterrupted]  # it did resume
    assert metrics_of(tmp_path / "halves") == metrics_of(tmp_path / "whole")
    assert torch.equal(weights_of(tmp_path / "halves"), weights_of(tmp_path / "whole"))


def test_temperature_reaches_the_loss(ranks, inputs, tmp_path):
    losses = []
    for temperature in (0.5, 4.0):
        fields = inputs | {
            "output_dir": str(tmp_path / str(temperature)),
            "temperature": temperature,
            "lmbda": 0.0,
            "max_steps": 1,
        }
        ranks(1).run(train, fields)
        losses.append(metrics_of(fields["output_dir"])[0]["train/loss"])
    assert losses[0] > 4 * losses[1]  # near-uniform distributions at 4 are far closer


def test_on_policy_counts_generated_tokens(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "lmbda": 1.0, "max_steps": 2}
    results = ranks(2).run(train, fields)
    for line in metrics_of(fields["output_dir"]):
        generated = line["rollout/tokens"]
        assert line["train/tokens"] == generated
    prompts = [set(map(len, (ids for _, ids in step))) for step in samples_of(results)]
    assert all(max(lengths) <= 64 for lengths in prompts)


@pytest.mark.parametrize("placement", ["zero3", "replicated"])
def test_seq_kd_trains_on_what_the_teacher_writes(ranks, inputs, tmp_path, placement):
    """From prompts alone: no answer is in the data."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    fields = inputs | {"dataset_name": str(prompts), "teacher_placement": placement}
    fields |= {"output_dir": str(tmp_path / "run"), "lmbda": 0.0, "seq_kd": True, "max_steps": 2}
    fields |= {"model_name_or_path": inputs["teacher_model_name_or_path"], "learning_rate": 0.0}
    by_teacher = samples_of(ranks(2).run(train, fields))
    by_itself = samples_of(ranks(2).run(train, fields | {"lmbda": 1.0, "output_dir": str(tmp_path / "own")}))
    assert by_teacher == by_itself  # the student is a copy of the teacher: the same seeds draw the same tokens


def test_bf16_gives_the_same_gradients(ranks, inputs, tmp_path):
    """bf16 compute against fp32, at weights that stay put (rate 0: a first Adam step is all signs and would part them).

    The same models in plain torch differ by up to 0.4 % in the gradient norm.
    """
    lines = []
    for bf16 in (False, True):
        fields = inputs | {"output_dir": str(tmp_path / str(bf16)), "bf16": bf16, "lmbda": 0.0, "learning_rate": 0.0}
        ranks(2).run(train, fields)
        lines.append(metrics_of(fields["output_dir"]))
    for exact, rounded in zip(*lines, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/nll"):
            assert rounded[name] == pytest.approx(exact[name], rel=1e-2), name


def test_completions_are_kept(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "lmbda": 1.0, "max_steps": 2, "log_completions_steps": 1}
    ranks(2).run(train, fields)
    rows = read_lines(tmp_path / "run" / "tables" / "completions.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4  # rank 0's half of each batch of eight
    assert all(row["prompt"].startswith("<|im_start|>user") and row["mean_divergence"] > 0 for row in rows)


def test_a_mixture_of_experts_student(ranks, inputs, tmp_path):
    """Qwen3-MoE under ZeRO-3: ranks route to different experts, and the run is that of one rank."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    tokenizer = tiny_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), **sizes, **experts, initializer_range=0.3, eos_token_id=None, bos_token_id=None
    )
    build(config, seed=4).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    runs = []
    for world_size in (1, 2):
        fields = inputs | {"model_name_or_path": str(tmp_path / "moe"), "output_dir": str(tmp_path / str(world_size))}
        runs.append((fields, ranks(world_size).run(train, fields)))
    assert samples_of(runs[1][1]) == samples_of(runs[0][1])
    assert_same_run(runs[1][0], runs[0][0], tolerance=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "1" / "final")
    own = torch.cat([p.detach().flatten() for _, p in sorted(exported.named_parameters())]).double()
    assert torch.equal(own, weights_of(tmp_path / "1"))


def refuse_evaluation_without_rows(folder: str) -> str:
    models, tokenizer = [tiny_llama(len(tiny_tokenizer())) for _ in range(2)], tiny_tokenizer()
    config = GKDConfig(eval_steps=2, output_dir=folder, max_length=64, max_new_tokens=8, report_to="none")
    data = [{"prompt": "abc", "completion": "de"}]
    with pytest.raises(ValueError) as caught:
        GKDTrainer(models[0], models[1], config, train_dataset=data, processing_class=tokenizer)
    return str(caught.value)


def test_evaluation_without_rows_is_an_error(ranks, tmp_path):
    """`train_dataset=` alone leaves nothing to evaluate on."""
    assert "eval_steps or eval_on_start is set" in ranks(1).run(refuse_evaluation_without_rows, str(tmp_path))[0]


def check_zero_at_the_teacher(betas: list[float]) -> list[tuple[float, float, float]]:
    """Loss and gradient norm of a student that is its teacher."""
    rows = []
    tokenizer = tiny_tokenizer()
    data = [{"prompt": "abc", "completion": "defgh" * (1 + i % 3)} for i in range(8)]
    for beta in betas:
        config = GKDConfig(
            beta=beta, lmbda=0.0, bf16=False, max_steps=1, report_to="none", per_device_train_batch_size=2,
            learning_rate=0.0, save_steps=None, max_length=64, max_new_tokens=8, gradient_checkpointing=False,
        )  # fmt: skip
        models = [tiny_llama(len(tokenizer), seed=3) for _ in range(2)]
        import tempfile

        import torch.distributed as dist

        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        config.output_dir = folder[0]
        trainer = GKDTrainer(models[0], models[1], config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        line = metrics_of(folder[0])[0] if dist.get_rank() == 0 else {"train/loss": 0.0, "train/grad_norm": 0.0}
        rows.append((beta, line["train/loss"], line["train/grad_norm"]))
        trainer.run.student.engine.destroy()
    return rows


def test_student_equal_to_teacher_has_no_loss_and_no_gradient(ranks):
    for beta, loss, norm in ranks(2).run(check_zero_at_the_teacher, [0.0, 0.1, 0.5, 0.9, 1.0])[0]:
        assert abs(loss) < 1e-6, beta
        assert norm < 1e-5, beta  # rounding of fp32 logits, where a step's gradient is about 0.3

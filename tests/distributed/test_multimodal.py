"""A multimodal student or teacher used for text: trained, saved, resumed, and exported with its vision as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine import GKDConfig, GKDTrainer
from engine.models.export import export_checkpoint
from tests.library.families import MULTIMODAL
from tests.library.models import build, tiny_llama, tiny_tokenizer
from tests.library.runs import assert_same_run, metrics_of, train, write_run_inputs

FAMILIES = ("gemma3", "qwen2_5_vl", "llama4")


def sized(name: str, num_ids: int):
    """The family's configuration for the tiny tokenizer's ids."""
    values = MULTIMODAL[name].to_dict()
    values["text_config"] |= {"vocab_size": num_ids, "max_position_embeddings": 512}
    special = [key for key in values if key.endswith(("_token_id", "_token_index")) and values[key] is not None]
    config = type(MULTIMODAL[name]).from_dict(values | dict.fromkeys(special, num_ids - 1))
    config.architectures = MULTIMODAL[name].architectures
    return config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("multimodal")
    fields = write_run_inputs(folder) | {"global_batch_size": 4, "lmbda": 0.5, "weight_decay": 0.1, "max_steps": 4}
    tokenizer = tiny_tokenizer()
    for name in FAMILIES:
        build(sized(name, len(tokenizer)), seed=3).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return fields | {"folder": str(folder)}


def reload(folder: Path) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_multimodal_student_trains_on_text(ranks, inputs, tmp_path, name):
    """The run is that of one rank; `final/` and the export of a checkpoint load, and only the text model moved."""
    folder = Path(inputs["folder"])
    fields = {key: value for key, value in inputs.items() if key != "folder"}
    fields["model_name_or_path"] = str(folder / name)
    runs = []
    for world_size in (1, 2):
        run = fields | {"output_dir": str(tmp_path / str(world_size)), "per_device_train_batch_size": 2}
        ranks(world_size).run(train, run)
        runs.append(run)
    assert_same_run(runs[1], runs[0], tolerance=2e-5)
    assert {0.0, 1.0} == {line["train/on_policy"] for line in metrics_of(tmp_path / "2")}
    final = tmp_path / "2" / "final"
    before, after = reload(folder / name).state_dict(), reload(final).state_dict()
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and not any("vision" in key or "visual" in key or "projector" in key for key in moved)
    assert any("vision" in key or "visual" in key for key in before.keys() - moved)
    export_checkpoint(tmp_path / "2" / "checkpoints" / "step_4", tmp_path / "out", None)
    exported, live = load_file(tmp_path / "out" / "model.safetensors"), load_file(final / "model.safetensors")
    assert exported.keys() == live.keys() and all(torch.equal(exported[key], live[key]) for key in live)
    reload(tmp_path / "out")


def test_resume_of_a_multimodal_student(ranks, inputs, tmp_path):
    """At the same number of ranks bit for bit, at another through the universal format; frozen weights included."""
    fields = {key: value for key, value in inputs.items() if key != "folder"}
    fields |= {"model_name_or_path": str(Path(inputs["folder"]) / "gemma3"), "per_device_train_batch_size": 2}
    whole = fields | {"output_dir": str(tmp_path / "whole")}
    ranks(2).run(train, whole)
    for world_size, tolerance in ((2, 0.0), (1, 2e-5)):
        halves = fields | {"output_dir": str(tmp_path / f"halves{world_size}"), "resume_from_checkpoint": "auto"}
        shutil.copytree(tmp_path / "whole", halves["output_dir"])
        shutil.rmtree(tmp_path / f"halves{world_size}" / "checkpoints" / "step_4")
        shutil.rmtree(tmp_path / f"halves{world_size}" / "final")
        (resumed, *_) = ranks(world_size).run(train, halves)
        assert len(resumed["seen"]) == 2
        assert_same_run(halves, whole, tolerance)


@pytest.mark.parametrize("placement", ["zero3", "replicated", "tensor_parallel", "between_steps"])
def test_a_multimodal_teacher_scores_text_alike_everywhere(ranks, inputs, tmp_path, placement):
    fields = {key: value for key, value in inputs.items() if key != "folder"}
    fields |= {"teacher_model_name_or_path": str(Path(inputs["folder"]) / "qwen2_5_vl"), "max_steps": 2, "lmbda": 0.0}
    fields |= {"per_device_train_batch_size": 2, "save_steps": None}
    plain = fields | {"output_dir": str(tmp_path / "plain")}
    ranks(1).run(train, plain)
    changes = {"teacher_placement": placement, "teacher_tp_size": 2}
    if placement == "between_steps":
        changes = {
            "teacher_placement": "replicated",
            "teacher_offload": placement,
            "deepspeed": "tests/fused_adam.json",
        }
    ranks(2).run(train, fields | {"output_dir": str(tmp_path / "other")} | changes)
    for ours, theirs in zip(metrics_of(tmp_path / "other"), metrics_of(tmp_path / "plain"), strict=True):
        for key in ("train/loss", "train/divergence", "teacher/teacher_entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


def train_frozen(output_dir: str, frozen: tuple[str, ...]) -> dict[str, bool]:
    """Which of a student's parameters moved, by name, with those frozen whose name has one of the words."""
    tokenizer = tiny_tokenizer()
    student, teacher = (tiny_llama(len(tokenizer), seed=seed) for seed in (0, 1))
    for name, param in student.named_parameters():
        param.requires_grad_(not any(word in name for word in frozen))
    before = {name: param.detach().clone() for name, param in student.named_parameters()}
    config = GKDConfig(
        output_dir=output_dir, bf16=False, report_to="none", lmbda=0.5, max_steps=2, save_steps=2, max_length=32,
        max_new_tokens=8, per_device_train_batch_size=2, learning_rate=1e-3,
    )  # fmt: skip
    data = [{"prompt": "abc", "completion": "defgh"}] * 8
    trainer = GKDTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.run.student.engine.destroy()
    after = load_file(Path(output_dir) / "final" / "model.safetensors")
    return {name: not torch.equal(before[name], after[name]) for name in before}


@pytest.mark.parametrize("frozen", [("embed_tokens", "layers.0"), ("lm_head",)], ids=str)
def test_what_the_user_freezes_stays(ranks, tmp_path, frozen):
    for moved in ranks(2).run(train_frozen, str(tmp_path / "run"), frozen):
        assert {name for name, has_moved in moved.items() if not has_moved} == {
            name for name in moved if any(word in name for word in frozen)
        }
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step_2", tmp_path / "out", None)
    exported, live = (load_file(tmp_path / path / "model.safetensors") for path in ("out", "run/final"))
    assert exported.keys() == live.keys() and all(torch.equal(exported[key], live[key]) for key in live)


def test_nothing_left_to_train(ranks, tmp_path):
    with pytest.raises(AssertionError, match="every parameter of the student is frozen"):
        ranks(1).run(train_frozen, str(tmp_path / "run"), ("",))

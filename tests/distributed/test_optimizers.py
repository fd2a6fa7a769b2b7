"""Optimizers and schedules under ZeRO-3: the same weights at any number of ranks, by name and handed over."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import GKDConfig, GKDTrainer
from tests.library.runs import read_metrics, train, weights_of, write_run_inputs

STEP_LR = "step_lr"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    return write_run_inputs(folder) | {
        "global_batch_size": 8, "lmbda": 0.0, "max_steps": 3, "save_steps": None, "weight_decay": 0.1,
        "dataset_test_split": "none",
    }  # fmt: skip


def apart(a: str, b: str) -> float:
    """Distance of two runs' exported weights, relative to their size."""
    first, second = weights_of(a), weights_of(b)
    return ((first - second).norm() / second.norm()).item()


def handed_over(fields: dict, optimizer_class: type, arguments: dict, schedule: str | None) -> str:
    """A run whose optimizer, and schedule, a script has made; returns the class that trained."""
    model = AutoModelForCausalLM.from_pretrained(fields["model_name_or_path"], dtype=torch.float32)
    optimizer = optimizer_class(model.parameters(), **arguments)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1) if schedule == STEP_LR else None
    tokenizer = AutoTokenizer.from_pretrained(fields["model_name_or_path"])
    config = GKDConfig(**fields)
    trainer = GKDTrainer(model, args=config, processing_class=tokenizer, optimizers=(optimizer, scheduler))
    trainer.train()
    engine = trainer.run.student.engine
    kind = type(engine.optimizer.optimizer).__name__
    engine.destroy()
    return kind


@pytest.mark.parametrize(
    "fields",
    [
        {"optim": "lion_32bit", "learning_rate": 1e-4},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
        {"optim": "rmsprop", "deepspeed": "ds_configs/zero3_offload.json"},
        pytest.param({"optim": "muon", "optim_args": "momentum=0.9"}, marks=pytest.mark.slow),  # torch compiles it
    ],
    ids=lambda fields: fields["optim"],
)
def test_weights_at_one_and_two_ranks(ranks, inputs, tmp_path, fields):
    folders = {}
    for name, world_size, change in (("one", 1, {}), ("two", 2, {}), ("none", 1, {"learning_rate": 0.0})):
        folders[name] = str(tmp_path / name)
        ranks(world_size).run(train, inputs | fields | {"output_dir": folders[name]} | change, deadline_s=600)
    # Muon's orthogonalisation is in bf16
    assert apart(folders["two"], folders["one"]) < (1e-3 if fields["optim"] == "muon" else 1e-5)
    assert apart(folders["one"], folders["none"]) > 1e-4


@pytest.mark.parametrize(
    "kind,arguments,same_as",
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}, {"optim": "adamw_torch"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_optimizer_that_is_handed_over(ranks, inputs, tmp_path, kind, arguments, same_as):
    """As the one that the fields make, at another number of ranks; `learning_rate` is the optimizer's."""
    fields = inputs | {"weight_decay": 0.0}
    own = fields | {"output_dir": str(tmp_path / "own"), "learning_rate": 0.1} | same_as
    ranks(1).run(train, own)
    given = fields | {"output_dir": str(tmp_path / "given")}
    assert ranks(2).run(handed_over, given, kind, arguments, None) == [kind.__name__] * 2
    assert apart(given["output_dir"], own["output_dir"]) < 1e-5
    assert read_metrics(given["output_dir"])[1]["train/lr"] == pytest.approx(0.1 * 2 / 3)  # the linear schedule's


def test_a_schedule_that_is_handed_over_goes_on_where_it_was(ranks, inputs, tmp_path):
    """Three steps in one go, and two and a third: the rates, and every weight."""
    fields = inputs | {"save_steps": 2, "max_steps": 4, "output_dir": str(tmp_path / "whole")}
    arguments = {"lr": 1e-2, "momentum": 0.9}
    ranks(2).run(handed_over, fields, torch.optim.SGD, arguments, STEP_LR)
    rates = [line["train/lr"] for line in read_metrics(tmp_path / "whole")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for name in ("checkpoints/step_4", "final"):
        shutil.rmtree(tmp_path / "halves" / name)
    halves = fields | {"output_dir": str(tmp_path / "halves"), "resume_from_checkpoint": "auto"}
    ranks(2).run(handed_over, halves, torch.optim.SGD, arguments, STEP_LR)
    assert [line["train/lr"] for line in read_metrics(tmp_path / "halves")] == rates
    assert torch.equal(weights_of(tmp_path / "halves"), weights_of(tmp_path / "whole"))
    with pytest.raises(AssertionError, match="the moments of torch.optim.sgd.SGD, and the optimizer is now torch"):
        ranks(2).run(train, halves)
    with pytest.raises(AssertionError, match="DeepSpeed converts Adam's moments alone"):
        ranks(1).run(handed_over, halves | {"max_steps": 5}, torch.optim.SGD, arguments, STEP_LR)


def test_a_schedule_that_goes_by_evaluations(ranks, inputs, tmp_path):
    """A rate so small that nothing improves: it is halved after each evaluation but the first."""
    fields = inputs | {
        "output_dir": str(tmp_path), "eval_strategy": "steps", "eval_steps": 1, "dataset_test_split": "test",
        "learning_rate": 1e-12, "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "eps": 0.0},
    }  # fmt: skip
    ranks(2).run(train, fields)
    rates = [line["train/lr"] for line in read_metrics(tmp_path) if "train/lr" in line]
    assert rates == pytest.approx([1e-12, 1e-12, 0.5e-12])

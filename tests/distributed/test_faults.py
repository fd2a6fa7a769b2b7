"""Losses and gradients that are not finite: the update is dropped on every rank, counted, and at last fatal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine import GKDConfig, GKDTrainer
from engine.errors import BadStepsError
from tests.distributed.test_training import metrics_of, weights_of
from tests.models import write_run_inputs


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    return write_run_inputs(tmp_path_factory.mktemp("faults")) | {
        "lmbda": 0.5, "global_batch_size": 8, "save_steps": None, "weight_decay": 0.1, "max_steps": 4,
    }  # fmt: skip


def spoil(trainer: GKDTrainer, kind: str, steps: list[int], rank: int) -> None:
    """Make the loss, or only its gradient, infinite on one rank at some steps, in the second micro-batch."""
    student, teacher = trainer.run.student, trainer.run.teacher
    signals, hidden = teacher.signals, student.hidden
    is_bad = False

    def spoilt_signals(batches):
        nonlocal is_bad
        for micro, signal in enumerate(signals(batches)):
            is_bad = trainer.state.step + 1 in steps and trainer.run.rank == rank and micro == 1
            if is_bad and kind == "loss":
                signal = dataclasses.replace(signal, hidden_NH=signal.hidden_NH * torch.nan)
            yield signal

    def spoilt_hidden(batch):
        student_NH = hidden(batch)
        if is_bad and kind == "gradient":
            student_NH.register_hook(lambda grad: grad * torch.inf)
        return student_NH

    teacher.signals, student.hidden = spoilt_signals, spoilt_hidden


def train_spoilt(fields: dict, kind: str, steps: list[int], rank: int) -> dict:
    """Train with spoilt steps; the whole student after each step, in fp32, and the error that ended it."""
    trainer = GKDTrainer(args=GKDConfig(**fields))
    spoil(trainer, kind, steps, rank)
    weights, error = [], None
    original = trainer._train_step

    def recorded():
        try:
            return original()
        finally:
            with trainer.run.student.gathered() as model:
                weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy())

    trainer._train_step = recorded
    try:
        trainer.train()
    except BadStepsError as raised:
        error = str(raised)
    trainer.run.student.engine.destroy()
    return {"weights": weights, "error": error, "bad_steps": trainer.state.bad_steps}


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_changes_nothing(ranks, fields, tmp_path, kind, offload):
    fields = fields | {"output_dir": str(tmp_path / "run"), "num_generations": 2}
    if offload:
        fields["deepspeed"] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
                               "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    results = ranks(2).run(train_spoilt, fields, kind, [2], 1)
    lines = metrics_of(tmp_path / "run")
    assert [line["train/bad_steps"] for line in lines] == [0, 1, 1, 1]
    assert (lines[1]["train/loss"] != lines[1]["train/loss"]) == (kind == "loss")  # not a number
    assert all(torch.isfinite(torch.tensor([line["train/loss"], line["train/grad_norm"]])).all() for line in lines[2:])
    for result in results:
        first, second, third, _ = (torch.from_numpy(w) for w in result["weights"])
        assert torch.equal(first, second) and not torch.equal(second, third) and torch.isfinite(third).all()
        assert result["bad_steps"] == 1 and result["error"] is None
    assert torch.isfinite(weights_of(tmp_path / "run")).all()


def test_a_bad_first_step_leaves_no_trace(ranks, fields, tmp_path):
    """Adam's moments and step count, too: step 2 moves the weights as it does with step 1's data left out."""
    spoilt = fields | {"output_dir": str(tmp_path / "spoilt"), "lr_scheduler_type": "constant", "weight_decay": 0.0}
    results = ranks(2).run(train_spoilt, spoilt, "loss", [1], 0)
    weights = [torch.from_numpy(w) for w in results[0]["weights"]]
    # Adam's first update has the size of the learning rate, whatever the gradient
    assert (weights[1] - weights[0]).abs().max().item() == pytest.approx(1e-3, rel=1e-2)


def test_too_many_in_a_row_end_the_run(ranks, fields, tmp_path):
    fields = fields | {"output_dir": str(tmp_path / "run"), "max_bad_steps": 2}
    results = ranks(2).run(train_spoilt, fields, "loss", [2, 3, 4], 1)
    for result in results:
        assert "step 3: the loss on rank 1 is not finite" in result["error"]
        assert "2 such steps in a row (max_bad_steps)" in result["error"]
    folder = Path(tmp_path / "run" / "bad_steps")
    names = {f"step_{step}_rank_{rank}.jsonl" for step in (2, 3) for rank in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names
    rows = [json.loads(line) for line in (folder / "step_3_rank_1.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [2, 3, 6, 7]  # rank 1's places in the global batch of 8
    assert [row["mean_divergence"] is None for row in rows] == [False, False, True, True]
    assert all("<|im_start|>user" in row["prompt"] for row in rows)


def test_good_steps_between_start_the_count_again(ranks, fields, tmp_path):
    fields = fields | {"output_dir": str(tmp_path / "run"), "max_bad_steps": 2}
    results = ranks(2).run(train_spoilt, fields, "gradient", [1, 3], 0)
    assert [result["error"] for result in results] == [None, None] and results[0]["bad_steps"] == 2

"""Callbacks on two ranks: which events come, what they see, and that one rank's wish is everyone's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback

from engine import GKDConfig, GKDTrainer
from tests.library.runs import metrics_of, write_run_inputs


class Recorder(TrainerCallback):
    """Wishes a save on rank 1, an evaluation on rank 0, then the end on rank 1."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict] = []
        self.kwargs: set[str] = set()
        for name in ("on_init_end", "on_train_begin", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_save",
                     "on_train_end"):  # fmt: skip
            setattr(self, name, lambda args, state, control, name=name, **kwargs: self.note(name, state))

    def note(self, name: str, state) -> None:
        self.events.append((name[3:], state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.note("on_step_end", state)
        self.kwargs = {name for name, value in kwargs.items() if value is not None}
        control.should_save |= dist.get_rank() == 1 and state.global_step == 2
        control.should_evaluate |= dist.get_rank() == 0 and state.global_step == 3
        return control

    def on_log(self, args, state, control, logs, **kwargs):
        self.note("on_log", state)
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.note("on_evaluate", state)
        assert metrics["eval/divergence"] > 0 and state.is_world_process_zero == (dist.get_rank() == 0)
        control.should_training_stop |= dist.get_rank() == 1


def train_recorded(fields: dict) -> dict:
    config = GKDConfig(**fields)
    before = dataclasses.replace(config)
    recorder = Recorder()
    trainer = GKDTrainer(model=fields["model_name_or_path"], args=config, callbacks=[recorder])
    trainer.add_callback(ProgressCallback)
    assert isinstance(trainer.pop_callback(ProgressCallback), ProgressCallback)
    trainer.remove_callback(recorder)
    trainer.add_callback(recorder)
    trainer.train()
    trainer.run.student.engine.destroy()
    assert config == before and trainer.config is not config
    state = trainer.callbacks.state
    return {"events": recorder.events, "logs": recorder.logs, "kwargs": recorder.kwargs, "epoch": state.epoch,
            "history": [line["step"] for line in state.log_history], "max_steps": state.max_steps}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(ranks, tmp_path_factory) -> tuple[Path, list[dict]]:
    fields = write_run_inputs(tmp_path_factory.mktemp("callbacks"), num_rows=14) | {
        "max_steps": 5, "save_steps": None, "logging_steps": 2, "logging_first_step": True, "global_batch_size": 8,
        "lmbda": 0.0,
    }  # fmt: skip
    return Path(fields["output_dir"]), ranks(2).run(train_recorded, fields)


def test_events_come_in_transformers_order(recorded):
    first, second = (result["events"] for result in recorded[1])
    assert first == second
    assert first == [
        ("init_end", 0), ("train_begin", 0),
        ("epoch_begin", 0), ("step_begin", 0), ("step_end", 1), ("log", 1),
        ("step_begin", 1), ("step_end", 2), ("epoch_end", 2), ("log", 2), ("save", 2),
        ("epoch_begin", 2), ("step_begin", 2), ("step_end", 3), ("log", 3), ("evaluate", 3),
        ("epoch_end", 3), ("log", 3), ("train_end", 3),
    ]  # fmt: skip


def test_a_wish_of_one_rank_counts_on_all_and_the_end_has_what_an_end_has(recorded):
    folder, _ = recorded
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_2"]
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["eval/divergence" in line for line in lines] == [False, False, True]
    assert (folder / "final" / "model.safetensors").is_file()


def test_callbacks_see_the_state(recorded):
    _, (result, other) = recorded
    assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= result["kwargs"]
    assert [("train/loss" in logs, "eval/divergence" in logs) for logs in result["logs"]] == [
        (True, False), (True, False), (False, True), (False, False)
    ]  # fmt: skip
    assert "train_loss" in result["logs"][-1]
    assert all({"train/loss", "eval/divergence", "train_loss"} & logs.keys() for logs in other["logs"])
    assert [sorted(logs) for logs in other["logs"]] == [sorted(logs) for logs in result["logs"]]
    assert result["history"] == [1, 2, 3, 3] and result["max_steps"] == 5
    assert result["epoch"] == pytest.approx(24 / 14)  # three steps of 8 in 14 rows

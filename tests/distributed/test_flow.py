"""When a run logs, evaluates and saves; its best checkpoint; what its log says by transformers' names."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)

from engine import GKDConfig, GKDTrainer
from engine.models.export import export_checkpoint
from tests.library.runs import checkpoints_in, metrics_of, train_metrics, write_run_inputs

SCORES = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 1.0, 6: 2.0}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
        "metric_for_best_model": "score", "save_total_limit": 1, "max_steps": 6}  # fmt: skip


class Scores(TrainerCallback):
    """Adds a metric to evaluations, on rank 0 alone; ends the process group's run by a signal in a step of its own."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if dist.get_rank() == 0:
            metrics["eval_score"] = SCORES[state.global_step]


def train_flow(fields: dict, *callbacks) -> dict:
    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=list(callbacks))
    trainer.train()
    trainer.save_model(Path(fields["output_dir"]) / "saved")
    state = trainer.state
    trainer.run.student.engine.destroy()
    best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
    return {"history": state.log_history, "best": best, "step": state.global_step}


def steps_with(history: list[dict], name: str) -> list[int]:
    return [line["step"] for line in history if name in line]


def evaluated_steps(folder: Path) -> list[int]:
    return [line["step"] for line in metrics_of(folder) if "eval/divergence" in line]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights_in(one), weights_in(other)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    fields = write_run_inputs(tmp_path_factory.mktemp("flow"), num_rows=14)
    return fields | {"lmbda": 0.5, "max_new_tokens": 4, "global_batch_size": 8}


@pytest.fixture(scope="module")
def scored(ranks, inputs, tmp_path_factory) -> tuple[Path, dict]:
    """Six steps on two ranks, the second of which is the best."""
    fields = inputs | BEST | {"output_dir": str(tmp_path_factory.mktemp("scored") / "run")}
    results = ranks(2).run(train_flow, fields, Scores())
    assert results[0]["best"] == results[1]["best"]
    return Path(fields["output_dir"]), results[0]


def test_epochs_end_with_a_log_an_evaluation_and_a_checkpoint(ranks, inputs, tmp_path):
    every = {name: "epoch" for name in ("logging_strategy", "eval_strategy", "save_strategy")}
    fields = inputs | every | {"output_dir": str(tmp_path), "max_steps": 5}
    result = ranks(2).run(train_flow, fields, ProgressCallback(), PrinterCallback())[0]  # 14 rows, 8 a step
    assert steps_with(result["history"], "loss") == [2, 4, 5]
    assert evaluated_steps(tmp_path) == steps_with(result["history"], "eval_loss") == [2, 4, 5]
    assert checkpoints_in(tmp_path) == [2, 4, 5]
    losses = [line["train/loss"] for line in train_metrics(tmp_path)]
    logged = [line["loss"] for line in result["history"] if "loss" in line]
    assert logged == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]])


def test_steps_below_one_are_a_share_and_the_first_evaluations_are_left_out(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path), "max_steps": 6, "logging_steps": 0.45, "logging_first_step": True,
                       "eval_strategy": "steps", "eval_steps": 0.3, "eval_delay": 3, "save_steps": 0.5}  # fmt: skip
    history = ranks(1).run(train_flow, fields)[0]["history"]
    assert steps_with(history, "loss") == [1, 3, 6]
    assert evaluated_steps(tmp_path) == [4, 6]
    assert checkpoints_in(tmp_path) == [3, 6]
    line = next(line for line in history if "loss" in line)
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step", "train/loss", "train/tokens"} <= line.keys()
    evaluation = next(line for line in history if "eval_loss" in line)
    assert evaluation["eval_loss"] == evaluation["eval/divergence"] == evaluation["eval_divergence"]
    assert evaluation["eval_perplexity"] == evaluation["eval/perplexity"]
    losses = [line["train/loss"] for line in train_metrics(tmp_path)]
    assert history[-1]["train_loss"] == pytest.approx(sum(losses) / 6) and history[-1]["step"] == 6
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second"} <= history[-1].keys()


def test_no_is_never(ranks, inputs, tmp_path):
    nothing = {name: "no" for name in ("logging_strategy", "eval_strategy", "save_strategy")}
    fields = inputs | nothing | {"output_dir": str(tmp_path), "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    history = ranks(1).run(train_flow, fields)[0]["history"]
    assert evaluated_steps(tmp_path) == [] and checkpoints_in(tmp_path) == []
    assert [sorted(line.keys() & {"loss", "train_loss"}) for line in history] == [["train_loss"]]
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_the_best_checkpoint_is_kept_exported_and_loaded(scored, tmp_path):
    folder, result = scored
    assert checkpoints_in(folder) == [2, 6]  # one by save_total_limit, beside the best
    assert result["best"] == (3.0, 2, str(folder / "checkpoints" / "step_2"))
    export_checkpoint(folder / "checkpoints" / "step_2", tmp_path / "second", None)
    assert_same_weights(folder / "best", tmp_path / "second")
    assert_same_weights(folder / "saved", folder / "best")  # what save_model writes after train()
    export_checkpoint(folder / "checkpoints" / "step_6", tmp_path / "last", None)
    assert_same_weights(folder / "final", tmp_path / "last")
    AutoModelForCausalLM.from_pretrained(folder / "best")
    saved = TrainerState.load_from_json(str(folder / "checkpoints" / "step_6" / "trainer_state.json"))
    assert (saved.best_metric, saved.best_global_step) == (3.0, 2)
    assert saved.best_model_checkpoint == str(folder / "checkpoints" / "step_2")
    assert steps_with(saved.log_history, "loss") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("world_size", [2, 1])
def test_a_resumed_run_knows_the_best_checkpoint(ranks, inputs, scored, tmp_path, world_size):
    """Stopped by a signal in step 3, whose evaluation then comes with the resume."""
    fields = inputs | BEST | {"output_dir": str(tmp_path / "run")}
    stopped = ranks(2).run(train_flow, fields, Scores(stop_at=3))[0]
    assert stopped["step"] == 3 and checkpoints_in(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "best").exists()
    result = ranks(world_size).run(train_flow, fields | {"resume_from_checkpoint": "auto"}, Scores())[0]
    folder, whole = scored
    assert result["best"] == (3.0, 2, str(tmp_path / "run" / "checkpoints" / "step_2"))
    assert checkpoints_in(tmp_path / "run") == [2, 6]
    assert_same_weights(tmp_path / "run" / "best", folder / "best")
    assert_same_weights(tmp_path / "run" / "saved", folder / "best")
    for name in ("loss", "eval_loss"):
        assert steps_with(result["history"], name) == steps_with(whole["history"], name)
    if world_size == 2:
        assert metrics_of(tmp_path / "run") == metrics_of(folder)


def test_saving_the_best_alone_and_stopping_early(ranks, inputs, tmp_path):
    fields = inputs | BEST | {"output_dir": str(tmp_path), "save_strategy": "best", "save_total_limit": None}
    result = ranks(2).run(train_flow, fields, Scores(), EarlyStoppingCallback(early_stopping_patience=3))[0]
    assert result["step"] == 5 and evaluated_steps(tmp_path) == [1, 2, 3, 4, 5]
    assert checkpoints_in(tmp_path) == [1, 2]
    assert_same_weights(tmp_path / "saved", tmp_path / "best")
    assert any(
        (value != weights_in(tmp_path / "final")[name]).any() for name, value in weights_in(tmp_path / "best").items()
    )


def patience_after(fields: dict) -> int:
    stopping = EarlyStoppingCallback(early_stopping_patience=5)
    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=[Scores(), stopping])
    trainer.train()
    trainer.run.student.engine.destroy()
    return next(c for c in trainer.callbacks.handler.callbacks if isinstance(c, EarlyStoppingCallback)).state()[
        "attributes"
    ]["early_stopping_patience_counter"]


@pytest.mark.parametrize(("restores", "expected"), [(True, 4), (False, 3)])
def test_a_callbacks_state_comes_back_where_that_is_asked_for(ranks, inputs, tmp_path, restores, expected):
    fields = inputs | BEST | {"output_dir": str(tmp_path), "save_total_limit": None}
    assert ranks(1).run(patience_after, fields)[0] == 4
    for name in ("checkpoints/step_4", "checkpoints/step_5", "checkpoints/step_6", "final", "best"):
        shutil.rmtree(tmp_path / name)
    again = {"resume_from_checkpoint": "auto", "restore_callback_states_from_checkpoint": restores}
    assert ranks(1).run(patience_after, fields | again)[0] == expected
    assert checkpoints_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def refused(fields: dict, *callbacks) -> str:
    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=list(callbacks))
    with pytest.raises(ValueError, match="metric_for_best_model='score' is no metric") as error:
        trainer.train()
    trainer.run.student.engine.destroy()
    return str(error.value)


def test_a_metric_that_is_not_there_is_named_with_those_that_are(ranks, inputs, tmp_path):
    fields = inputs | BEST | {"output_dir": str(tmp_path / "known")}
    for said in ranks(2).run(refused, fields):
        assert "there are loss, divergence, perplexity, acceptance, top1_agreement, divergence_on_policy" in said
    assert not (tmp_path / "known" / "metrics.jsonl").exists()  # it was known before the first step
    fields = inputs | BEST | {"output_dir": str(tmp_path / "first")}
    assert "there are loss, divergence" in ranks(2).run(refused, fields, AddsNothing())[0]


class AddsNothing(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert "eval_score" not in metrics


def refused_start(fields: dict) -> str:
    with pytest.raises(ValueError) as error:
        GKDTrainer(args=GKDConfig(**fields))
    return str(error.value)


def test_checkpoints_of_the_model_alone_load_with_transformers_and_cannot_be_resumed(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "save_only_model": True, "save_strategy": "best",
                       "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score", "max_steps": 3,
                       "save_total_limit": 1}  # fmt: skip
    ranks(2).run(train_flow, fields, Scores())
    assert checkpoints_in(tmp_path / "run") == [2]
    path = tmp_path / "run" / "checkpoints" / "step_2"
    names = {item.name for item in path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "manifest.json"} <= names
    assert not any("optim" in name for name in names) and not any(item.is_dir() for item in path.iterdir())
    whole = inputs | {"output_dir": str(tmp_path / "whole"), "max_steps": 3, "save_steps": 2}
    ranks(2).run(train_flow, whole)
    export_checkpoint(tmp_path / "whole" / "checkpoints" / "step_2", tmp_path / "second", None)
    assert_same_weights(path, tmp_path / "second")
    AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="is a Hugging Face folder already"):
        export_checkpoint(path, tmp_path / "again", None)
    for wanted in (str(path), "auto"):
        said = ranks(2).run(refused_start, fields | {"resume_from_checkpoint": wanted})[0]
        assert ("name it as model_name_or_path of a new run" in said) == (wanted != "auto")
        assert wanted != "auto" or "nothing to go on from" in said


def test_a_stream_has_no_epochs(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path), "dataset_streaming": True, "eval_strategy": "epoch",
                       "save_strategy": "epoch"}  # fmt: skip
    said = ranks(1).run(refused_start, fields)[0]
    assert "eval_strategy, save_strategy: epoch, and a stream has no epochs: use steps" in said

"""`GKDTrainer` as scripts call it: what `train` takes and returns, and from where it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from engine import GKDConfig, GKDTrainer
from engine.models.backbone import check_usable
from tests.library.runs import (
    assert_same_run,
    checkpoints_in,
    metrics_of,
    train,
    weights_of,
    write_run_inputs,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_run_inputs(tmp_path_factory.mktemp("trainer")) | {"global_batch_size": 4}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def work(fields: dict, resume=None, stop_at: int | None = None) -> dict:
    """A script; what `train` returned, and what the trainer knows then."""
    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=[StopAt(stop_at)] if stop_at else None)
    output = trainer.train(resume_from_checkpoint=resume)
    with pytest.raises(ValueError, match="trains once"):
        trainer.train()
    trainer.run.student.engine.destroy()
    return {"output": output, "history": trainer.state.log_history}


@pytest.fixture(scope="module")
def whole(ranks, inputs, tmp_path_factory) -> tuple[dict, dict]:
    fields = inputs | {"output_dir": str(tmp_path_factory.mktemp("whole") / "run")}
    return fields, ranks(2).run(work, fields)[0]


@pytest.fixture(scope="module")
def half(ranks, inputs, tmp_path_factory) -> Path:
    """A run that a callback ended at step 2; to be copied."""
    folder = tmp_path_factory.mktemp("half") / "run"
    ranks(2).run(work, inputs | {"output_dir": str(folder)}, None, 2)
    return folder


@pytest.fixture
def copy(half, tmp_path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def test_train_tells_steps_loss_and_speed(whole):
    fields, result = whole
    losses = [line["train/loss"] for line in metrics_of(fields["output_dir"])]
    output = result["output"]
    assert output.global_step == 4 and output.training_loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert output.metrics["train_loss"] == output.training_loss and output.metrics["epoch"] == pytest.approx(16 / 24)
    seconds = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] == pytest.approx(16 / seconds, rel=0.05, abs=0.01)
    assert result["history"][-1] == output.metrics | {"step": 4}


@pytest.mark.parametrize("world_size,by_path", [(1, False), (2, False), (2, True)])
def test_train_goes_on_where_it_is_told_to(ranks, inputs, whole, copy, world_size, by_path):
    fields = inputs | {"output_dir": str(copy)}
    del fields["global_batch_size"]  # taken over from the checkpoint
    fields["gradient_accumulation_steps"] = 1
    resume = str(copy / "checkpoints" / "step_2") if by_path else True
    (result, *_) = ranks(world_size).run(work, fields, resume)
    assert result["output"].global_step == 4 and checkpoints_in(copy) == [2, 4]
    theirs = whole[0]
    if world_size == 2:
        ours = metrics_of(copy)
        ours[1] = {name: value for name, value in ours[1].items() if not name.startswith("eval/")}
        assert ours == metrics_of(theirs["output_dir"])
    difference = (weights_of(copy) - weights_of(theirs["output_dir"])).norm() / weights_of(copy).norm()
    assert difference <= (0 if world_size == 2 else 1e-6)


def test_log_history_has_what_trls_test_asks_for(ranks, inputs, tmp_path):
    fields = inputs | {
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 10,
    }
    history = ranks(2).run(work, fields)[0]["history"]
    assert history[-1]["train_loss"] is not None
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4] and all(e["eval_loss"] > 0 for e in evaluations)


def refused(fields: dict, resume) -> str:
    trainer = GKDTrainer(args=GKDConfig(**fields))
    with pytest.raises(ValueError) as raised:
        trainer.train(resume_from_checkpoint=resume)
    trainer.run.student.engine.destroy()
    return str(raised.value)


def test_a_used_folder_needs_a_word(ranks, inputs, copy, tmp_path):
    before = metrics_of(copy)
    said = ranks(2).run(refused, inputs | {"output_dir": str(copy)}, None)
    assert all("holds an earlier run" in text for text in said) and metrics_of(copy) == before
    said = ranks(2).run(refused, inputs | {"output_dir": str(tmp_path / "new")}, True)
    assert all("holds no complete checkpoint" in text for text in said)


def test_a_checkpoint_of_larger_steps_is_named(ranks, inputs, half, tmp_path):
    checkpoint = str(half / "checkpoints" / "step_2")
    fields = inputs | {"output_dir": str(tmp_path / "new"), "global_batch_size": 8}
    assert "set global_batch_size=4" in ranks(2).run(refused, fields, checkpoint)[0]
    del fields["global_batch_size"]  # 2 sequences a step
    assert "resume_from_checkpoint of GKDConfig takes over the size" in ranks(1).run(refused, fields, checkpoint)[0]


def test_what_the_configuration_says_counts_where_train_says_nothing(ranks, inputs, whole, copy):
    ranks(2).run(train, inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto"})
    assert (weights_of(copy) == weights_of(whole[0]["output_dir"])).all()


def rows(*answers: str) -> list[dict]:
    return [{"prompt": "what?", "completion": answer} for answer in answers]


def evaluate(fields: dict, datasets: list) -> dict:
    """Evaluate before training, on other rows, and after it."""
    trainer = GKDTrainer(args=GKDConfig(**fields), eval_dataset={"short": rows("a", "b"), "long": rows("yes " * 5)})
    results = [trainer.evaluate(), *(trainer.evaluate(data, metric_key_prefix="test") for data in datasets)]
    trainer.train()
    results.append(trainer.evaluate())
    trainer.run.student.engine.destroy()
    return {"results": results, "history": trainer.state.log_history}


def test_evaluate_alone_on_other_rows_and_on_several_sets(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "eval_on_start": True}
    datasets = [rows("a", "b"), {"long": rows("yes " * 5)}]
    (first, second), (alone,) = (ranks(n).run(evaluate, fields | {"output_dir": str(tmp_path / str(n))}, datasets)
                                 for n in (2, 1))  # fmt: skip
    before, other, named, after = first["results"]
    assert {"eval_short_loss", "eval_long_loss", "eval_long_perplexity", "eval_runtime", "epoch"} <= before.keys()
    assert other["test_loss"] == before["eval_short_loss"] and named["test_long_loss"] == before["eval_long_loss"]
    assert after["eval_long_loss"] != before["eval_long_loss"]
    assert [r["eval_long_loss"] for r in (second["results"][0], second["results"][3])] == [
        before["eval_long_loss"], after["eval_long_loss"]
    ]  # fmt: skip
    assert alone["results"][0]["eval_long_loss"] == pytest.approx(before["eval_long_loss"], rel=1e-5)
    logged = [entry["eval_short_loss"] for entry in first["history"] if "eval_short_loss" in entry]
    assert logged[0] == before["eval_short_loss"] and logged[-1] == after["eval_short_loss"]
    lines = metrics_of(tmp_path / "2")
    assert lines[0]["eval/short/divergence"] == before["eval_short_loss"]
    assert lines[-1]["eval/long/divergence"] == after["eval_long_loss"]


def nothing_to_evaluate(fields: dict) -> str:
    trainer = GKDTrainer(args=GKDConfig(**fields))
    with pytest.raises(ValueError, match="no rows") as raised:
        trainer.evaluate()
    trainer.run.student.engine.destroy()
    return str(raised.value)


def test_nothing_to_evaluate_on_is_an_error(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "dataset_test_split": "none"}
    assert "pass eval_dataset" in ranks(1).run(nothing_to_evaluate, fields)[0]


def as_messages(row: dict) -> dict:
    return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}


def train_formatted(fields: dict, kind: str) -> dict:
    """Train on questions and answers, brought into shape by `formatting_func`, or beforehand."""
    pairs = [{"q": f"question {i}?", "a": "yes " * (1 + i % 3)} for i in range(8)]
    rows, given = [as_messages(row) for row in pairs], {}
    if kind != "beforehand":
        rows, given = pairs, {"formatting_func": as_messages}
    if kind == "dataset":
        rows = Dataset.from_list(rows)
    trainer = GKDTrainer(args=GKDConfig(**fields), train_dataset=rows, eval_dataset={"one": rows}, **given)
    trainer.train()
    metrics = trainer.evaluate(rows)
    trainer.run.student.engine.destroy()
    return metrics


def test_a_formatting_function_makes_the_rows(ranks, inputs, tmp_path):
    metrics = {}
    for kind in ("beforehand", "list", "dataset"):
        fields = inputs | {"output_dir": str(tmp_path / kind), "max_steps": 2}
        metrics[kind] = ranks(2).run(train_formatted, fields, kind)[0]["eval_loss"]
        assert (weights_of(tmp_path / kind) == weights_of(tmp_path / "beforehand")).all()
    assert len(set(metrics.values())) == 1


def no_rows(fields: dict) -> str:
    with pytest.raises(ValueError) as raised:
        GKDTrainer(args=GKDConfig(**fields), train_dataset=[{"q": "a"}], formatting_func=lambda row: row["q"])
    return str(raised.value)


def test_a_formatting_function_that_makes_text_is_refused(ranks, inputs, tmp_path):
    said = ranks(2).run(no_rows, inputs | {"output_dir": str(tmp_path / "run")})
    assert all("has `text` alone, which does not say where a prompt ends" in text for text in said)


def train_objects(fields: dict) -> None:
    """Train objects as notebooks leave them: with a device map, a training mode, and settings to sample with."""
    names = fields["model_name_or_path"], fields["teacher_model_name_or_path"]
    student, teacher = (
        dispatch_model(
            AutoModelForCausalLM.from_pretrained(name, device_map="cpu").train(), {"": "cpu"}, force_hooks=True
        )
        for name in names
    )
    assert student.hf_device_map and student._hf_hook
    student.generation_config.update(do_sample=True, temperature=0.3, top_k=5, max_length=20)
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    trainer = GKDTrainer(student, teacher, GKDConfig(**fields), processing_class=tokenizer)
    trainer.train()
    trainer.run.student.engine.destroy()


def test_objects_with_a_device_map_train_as_names_do(ranks, inputs, tmp_path):
    by_name, objects = (inputs | {"output_dir": str(tmp_path / name), "lmbda": 0.5, "seed": 3} for name in "ab")
    ranks(2).run(train, by_name)
    ranks(2).run(train_objects, objects)
    assert_same_run(objects, by_name, tolerance=0)


def test_offloaded_weights_are_refused_early(inputs):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs["model_name_or_path"]))
    model.hf_device_map = {"": "disk"}
    with pytest.raises(ValueError, match="device_map= has offloaded some of its weights"):
        check_usable(model, 64)


def evaluate_without_training_rows(fields: dict, test: list[dict]) -> dict:
    trainer = GKDTrainer(args=GKDConfig(**fields | {"dataset_name": None}), eval_dataset=test)
    metrics = trainer.evaluate()
    with pytest.raises(ValueError, match="train: there are no rows to train on"):
        trainer.train()
    trainer.run.student.engine.destroy()
    return metrics


def test_a_trainer_without_training_rows_evaluates(ranks, inputs, whole, tmp_path):
    """In a folder that holds a run, too: nothing is written there. At the start the student is the run's."""
    test = rows("a", "yes yes")
    folder = whole[0]["output_dir"]
    before = sorted(path.name for path in Path(folder).iterdir())
    found = ranks(2).run(evaluate_without_training_rows, inputs | {"output_dir": folder}, test)
    assert found[0]["eval_loss"] == found[1]["eval_loss"] > 0
    assert sorted(path.name for path in Path(folder).iterdir()) == before
    fields = inputs | {"output_dir": str(tmp_path / "run")}
    sets = [test, {"long": test}]
    both = ranks(2).run(evaluate, fields, sets)[0]["results"]
    assert found[0]["eval_loss"] == both[1]["test_loss"]


def test_a_fresh_start_contradicts_a_configuration_that_resumes(ranks, inputs, copy):
    fields = inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    said = ranks(2).run(refused, fields, False)
    assert all("train(resume_from_checkpoint=False), and args resume from 'auto'" in text for text in said)

"""A run's life: it never destroys another, ends in a checkpoint, goes on from its end, and says what changed."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
from transformers import TrainerCallback

from engine import GKDConfig, GKDTrainer
from engine.errors import CheckpointError
from engine.models.export import export_checkpoint
from tests.library.models import tiny_llama, tiny_tokenizer
from tests.library.runs import checkpoints_in, metrics_of, train, weights_of, write_run_inputs

STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("life")
    return write_run_inputs(folder) | {"max_steps": STEPS, "save_steps": 2, "lmbda": 0.5, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def finished(ranks, inputs) -> Path:
    """A run of three steps on two ranks, to be copied."""
    ranks(2).run(train, inputs)
    return Path(inputs["output_dir"])


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(fields: dict) -> str:
    """What a start says that must not come to a model."""
    with mock.patch("engine.models.student.load_causal_lm", side_effect=AssertionError("a model loads")):
        with pytest.raises(ValueError) as error:
            GKDTrainer(args=GKDConfig(**fields), resumes_later=False)
    return str(error.value)


def break_off(fields: dict, broken: str) -> str:
    """Train until `broken`, a function by its full name, is called."""
    trainer = GKDTrainer(args=GKDConfig(**fields))
    with mock.patch(broken, side_effect=KeyError("the bug")), pytest.raises(KeyError) as error:
        trainer.train()
    trainer.run.student.engine.destroy()
    return str(error.value)


def test_a_used_folder_is_refused_on_all_ranks_before_a_model_loads(ranks, inputs, finished, copy):
    for said in ranks(2).run(refused, inputs | {"output_dir": str(copy)}):
        assert "holds an earlier run (checkpoints/step_3 and 1 more, metrics.jsonl, final)" in said
        assert "--resume_from_checkpoint auto" in said and "--overwrite_output_dir" in said
    assert metrics_of(copy) == metrics_of(finished)
    shutil.rmtree(copy / "checkpoints")
    resumed = inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    assert "none of its checkpoints is whole" in ranks(2).run(refused, resumed)[0]
    assert (copy / "final" / "model.safetensors").is_file()


def test_starting_anew_replaces_the_run_and_nothing_else(ranks, inputs, finished, copy):
    (copy / "notes.txt").write_text("mine")
    ranks(2).run(train, inputs | {"output_dir": str(copy), "overwrite_output_dir": True})
    assert metrics_of(copy) == metrics_of(finished) and (copy / "notes.txt").read_text() == "mine"
    assert checkpoints_in(copy) == [2, 3]


def test_the_last_step_is_a_checkpoint_and_the_test_split_is_evaluated_at_the_end(finished):
    assert checkpoints_in(finished) == [2, 3]
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]  # the evaluation joins the last step's line
    assert {"eval/divergence", "train/loss"} <= lines[2].keys() and "eval/divergence" not in lines[1]


def test_without_saving_or_a_test_split_there_is_neither(ranks, inputs, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(Path(inputs["dataset_name"]) / "train.jsonl", data)
    fields = inputs | {"output_dir": str(tmp_path / "run"), "save_steps": None, "dataset_name": str(data)}
    ranks(2).run(train, fields)
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "run" / "final" / "config.json").is_file()
    assert not any(name.startswith("eval/") for line in metrics_of(tmp_path / "run") for name in line)
    ranks(2).run(
        train, inputs | {"output_dir": str(tmp_path / "off"), "save_steps": None, "dataset_test_split": "none"}
    )
    assert metrics_of(tmp_path / "off") == metrics_of(tmp_path / "run")


@pytest.mark.parametrize("broken", ["engine.evaluation.Evaluator.run", "engine.publication.export_student"])
def test_what_breaks_after_the_last_step_costs_no_step(ranks, inputs, finished, tmp_path, broken):
    fields = inputs | {"output_dir": str(tmp_path / "run")}
    ranks(2).run(break_off, fields, broken)
    assert checkpoints_in(tmp_path / "run") == [2, 3] and not (tmp_path / "run" / "final").exists()
    assert "train/loss" in metrics_of(tmp_path / "run")[2]
    results = ranks(2).run(train, fields | {"resume_from_checkpoint": "auto"})
    assert all(r["seen"] == [] for r in results)
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    assert (weights_of(tmp_path / "run") == weights_of(finished)).all()


def test_a_finished_run_goes_on_with_more_steps(ranks, inputs, tmp_path):
    """At a constant rate, the longer run is the one that had been asked for at once."""
    fields = inputs | {"lr_scheduler_type": "constant"}
    ranks(2).run(train, fields | {"output_dir": str(tmp_path / "whole"), "max_steps": 5})
    short = fields | {"output_dir": str(tmp_path / "run")}
    ranks(2).run(train, short)
    (tmp_path / "run" / "final" / "README.md").write_text("mine")
    ranks(2).run(train, short | {"max_steps": 5, "resume_from_checkpoint": "auto"})
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole")
    ours[2] = {name: value for name, value in ours[2].items() if not name.startswith("eval/")}
    assert ours == theirs and checkpoints_in(tmp_path / "run") == [2, 3, 4, 5]
    assert (weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")).all()
    assert (tmp_path / "run" / "final" / "README.md").read_text() == "mine"


def fill_disk_at_export(fields: dict) -> str:
    """Train; from the export on, no file of more than 8 kB can be written."""
    from engine.models import export

    write = export.write_model_folder

    def on_full_disk(*args) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
        write(*args)

    trainer = GKDTrainer(args=GKDConfig(**fields))
    try:
        with mock.patch.object(export, "write_model_folder", on_full_disk), pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer.run.student.engine.destroy()
    return str(error.value)


def test_a_disk_that_fills_in_the_export_costs_nothing(ranks, inputs, finished, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run")}
    for said in ranks(2).run(fill_disk_at_export, fields):
        assert "final cannot be written: rank 0: model-00001.safetensors" in said and "MiB free" in said
        assert "\n" not in said
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert "final" not in names and ".writing_final" not in names
    ranks(2).run(train, fields | {"resume_from_checkpoint": "auto"})
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    assert (weights_of(tmp_path / "run") == weights_of(finished)).all()


NEW = {"learning_rate": 4e-4, "weight_decay": 0.3, "adam_epsilon": 1e-3, "lr_scheduler_type": "cosine", "max_steps": 6}


def new_rate(step: int) -> float:
    """The rate of `NEW` in optimizer step `step`, from 0."""
    return 4e-4 * 0.5 * (1 + math.cos(math.pi * step / 6))


def train_and_listen(fields: dict) -> tuple[dict, list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("engine")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return train(fields), records
    finally:
        logger.removeHandler(handler)


def train_by_hand(fields: dict) -> None:
    """Go on with the settings of `NEW` written into the optimizer before every step."""

    class NewSettings(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            for group, decay in zip(optimizer.optimizer.param_groups, (0.3, 0.0), strict=True):
                group.update(lr=new_rate(state.global_step), eps=1e-3, weight_decay=decay)

    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=[NewSettings])
    trainer.train()
    trainer.run.student.engine.destroy()


@pytest.fixture(scope="module")
def by_hand(ranks, inputs, finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by_hand") / "run"
    shutil.copytree(finished, folder)
    ranks(2).run(train_by_hand, inputs | {"output_dir": str(folder), "max_steps": 6, "resume_from_checkpoint": "auto"})
    return folder


@pytest.mark.parametrize("world_size", [2, 1])
def test_new_settings_count_after_a_resume_and_are_named(ranks, inputs, copy, by_hand, world_size):
    """The new schedule goes on where it stands at that step, moments stay: in DeepSpeed's format and the universal."""
    fields = inputs | NEW | {"output_dir": str(copy), "resume_from_checkpoint": "auto", "logging_steps": 5}
    _, said = ranks(world_size).run(train_and_listen, fields)[0]
    lines = metrics_of(copy)
    assert [line["train/lr"] for line in lines[3:]] == pytest.approx([new_rate(step) for step in (3, 4, 5)], rel=1e-12)
    changed = sorted(text for text in said if "in the checkpoint" in text)
    assert [text.split(": ")[1].split("=")[0] for text in changed] == sorted(NEW)
    assert "learning_rate=0.001 in the checkpoint, 0.0004 now: the new value counts" in changed[1]
    ours, theirs = weights_of(copy), weights_of(by_hand)
    assert (ours == theirs).all() if world_size == 2 else ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.slow  # DeepSpeed compiles its Adam
def test_new_settings_count_with_deepspeeds_own_optimizer(ranks, inputs, tmp_path):
    """Which keeps a count of steps in its groups."""
    fields = inputs | {"deepspeed": "tests/fused_adam.json", "output_dir": str(tmp_path / "run")}
    ranks(2).run(train, fields)
    ranks(2).run(train, fields | NEW | {"resume_from_checkpoint": "auto"})
    rates = [line["train/lr"] for line in metrics_of(tmp_path / "run")[3:]]
    assert rates == pytest.approx([new_rate(step) for step in (3, 4, 5)], rel=1e-12)


def test_another_precision_goes_on_from_the_same_weights(ranks, inputs, finished, tmp_path):
    """Through the universal format, as DeepSpeed names the files of a checkpoint after the precision."""
    lines = []
    for bf16 in (False, True):
        copy = shutil.copytree(finished, tmp_path / str(bf16))
        fields = inputs | {"output_dir": str(copy), "bf16": bf16, "lmbda": 0.0, "max_steps": 4}
        ranks(2).run(train, fields | {"resume_from_checkpoint": "auto"})
        lines.append(metrics_of(copy)[3])
    for name in ("train/loss", "train/grad_norm"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=2e-2), name
    assert lines[1]["train/lr"] == lines[0]["train/lr"]


def test_a_length_before_the_checkpoint_and_another_seed_are_refused(ranks, inputs, finished, copy):
    resumed = inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    said = ranks(2).run(refused, resumed | {"max_steps": 2})[0]
    assert "max_steps=2 ends before step 3 of" in said
    said = ranks(2).run(refused, resumed | {"max_steps": -1, "num_train_epochs": 0.2})[0]
    assert "num_train_epochs=0.2 with its 2 steps ends before step 3" in said
    said = ranks(2).run(refused, resumed | {"seed": 7})[0]
    assert "seed=42 in the checkpoint, 7 now: the order of rows" in said and "--allow_data_change" in said
    said = ranks(2).run(refused, resumed | {"deepspeed": "tests/fused_adam.json"})[0]
    assert "holds the moments of torch.optim.AdamW, and the optimizer is now AdamW" in said
    assert metrics_of(copy) == metrics_of(finished)


def test_other_rows_are_named_and_begun_anew_only_if_told(ranks, inputs, copy, tmp_path):
    data = Path(
        shutil.copytree(inputs["dataset_name"], tmp_path / "data")
    )  # another place of the same rows is no change
    resumed = inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto", "dataset_name": str(data)}
    resumed |= {"max_steps": 5, "lmbda": 0.0}
    train_file = data / "train.jsonl"
    train_file.write_text(train_file.read_text() + '{"prompt": "more", "completion": "rows"}\n')
    (data / "test.jsonl").write_text('{"prompt": "more", "completion": "rows"}\n')
    said = ranks(2).run(refused, resumed)[0]
    assert "the rows of split 'train' are not those of the checkpoint (24 usable rows then, 25 usable rows now)" in said
    results = ranks(2).run(train_and_listen, resumed | {"allow_data_change": True})
    assert any("begins anew" in text for text in results[0][1])
    assert any("split 'test'" in text and "do not compare" in text for text in results[0][1])
    fresh = ranks(2).run(train, resumed | {"output_dir": str(tmp_path / "fresh"), "resume_from_checkpoint": None})
    assert [r["seen"] for r, _ in results] == [r["seen"][:2] for r in fresh]


def test_a_checkpoint_of_an_older_engine_is_accepted(ranks, inputs, copy):
    path = copy / "checkpoints" / "step_3" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["data"], manifest["optimizer"], manifest["config"]["seed"]
    manifest["config"]["a_field_that_went"] = 3
    path.write_text(json.dumps(manifest))
    fields = inputs | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    _, said = ranks(2).run(train_and_listen, fields)[0]
    assert any(text.startswith("step 3 of 3 is the last") for text in said)


def refuse_settings(folder: str) -> list[str]:
    """Students as objects: one whose sampling settings were changed into a contradiction, and one that is sound."""
    tokenizer, said = tiny_tokenizer(), []
    for do_sample in (False, True):
        student, teacher = (tiny_llama(len(tokenizer), seed=seed) for seed in (1, 2))
        student.generation_config.temperature, student.generation_config.do_sample = 0.5, do_sample
        config = GKDConfig(output_dir=folder, max_length=64, max_new_tokens=8, report_to="none")
        with (
            mock.patch("engine.assembly.build_student", side_effect=ValueError("built")),
            pytest.raises(ValueError) as e,
        ):
            GKDTrainer(student, teacher, config, train_dataset=[ROW], processing_class=tokenizer)
        said.append(str(e.value))
    return said


ROW = {"prompt": "abc", "completion": "de"}


def test_settings_that_cannot_be_saved_are_found_at_start(ranks, tmp_path):
    for refused, accepted in ranks(2).run(refuse_settings, str(tmp_path)):
        assert (
            "no checkpoint or export could be written" in refused and "temperature" in refused and "\n" not in refused
        )
        assert accepted == "built"


def test_exports_stop_where_rollouts_stopped(ranks, inputs, tmp_path):
    """The student's own settings know one stop id, and contradict themselves as published ones do; its tokenizer and
    template end a turn with another."""
    student = Path(shutil.copytree(inputs["model_name_or_path"], tmp_path / "student"))
    (student / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6, "top_p": 0.9}')
    end = tiny_tokenizer().eos_token_id
    fields = inputs | {"model_name_or_path": str(student), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    ranks(2).run(train, fields | {"dataset_test_split": "none"})
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "out", None)
    for folder in ("run/final", "run/checkpoints/step_1/hf", "out"):
        settings = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [7, end] and settings["temperature"] == 0.6
    resumed = fields | {"model_name_or_path": str(tmp_path / "run" / "final"), "output_dir": str(tmp_path / "next")}
    ranks(2).run(train, resumed | {"dataset_test_split": "none"})  # a second stage
    settings = json.loads((tmp_path / "next" / "final" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [7, end]

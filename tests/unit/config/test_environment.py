"""What scripts and callbacks ask of `args`, and classes of arguments that scripts make of `GKDConfig`."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import ParallelMode

from engine.config import GKDConfig, config_from_dict
from engine.trainer import GKDTrainer


@pytest.fixture
def second_of_four(monkeypatch):
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_before_the_group_is_there_the_launcher_answers(second_of_four):
    args = GKDConfig()
    assert (args.world_size, args.process_index, args.local_process_index) == (4, 3, 1)
    assert not args.should_log and not args.should_save and args.parallel_mode == ParallelMode.DISTRIBUTED
    assert args.get_process_log_level() == logging.WARNING
    assert GKDConfig(log_level_replica="error").get_process_log_level() == logging.ERROR


def test_a_process_alone(alone):
    args = GKDConfig(use_cpu=True, per_device_train_batch_size=3, per_device_eval_batch_size=5, log_level="info")
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    assert args.should_log and args.should_save and args.parallel_mode == ParallelMode.NOT_PARALLEL
    assert (args.device, args.n_gpu) == (torch.device("cpu"), 0)
    assert (args.train_batch_size, args.eval_batch_size) == (3, 5)
    assert args.get_process_log_level() == logging.INFO
    with args.main_process_first():
        pass


def test_what_a_script_sets_afterwards_is_read_as_well():
    args = GKDConfig("out", dataset_name="rows")
    args.teacher_model_init_kwargs = {"torch_dtype": torch.bfloat16, "revision": "main"}
    args.max_seq_length = "512"
    read = args.checked_copy()
    assert read.teacher_model_init_kwargs == {"dtype": "bfloat16", "revision": "main"}
    assert (read.max_length, read.dataset_name, args.max_length) == (512, "rows", 1024)
    args.lmbda = 2
    with pytest.raises(ValueError, match="lmbda=2"):
        args.checked_copy()


def test_records_for_scripts(alone):
    args = GKDConfig(model_init_kwargs={"torch_dtype": torch.bfloat16}, report_to=["wandb", "tensorboard"])
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert config_from_dict(json.loads(args.to_json_string())) == args
    plain = args.to_sanitized_dict()
    assert all(isinstance(value, (bool, int, float, str)) for value in plain.values())
    assert plain["train_batch_size"] == 8 and plain["report_to"] == "['wandb', 'tensorboard']"


def test_it_shows_what_is_not_at_its_default():
    assert repr(GKDConfig("out", lmbda=0.25, report_to="none")) == (
        "GKDConfig(output_dir='out', lmbda=0.25, report_to=[])"
    )


def test_the_project_has_two_names():
    assert GKDConfig().named_project is None
    assert GKDConfig(project="p").named_project == "p"
    assert GKDConfig(project="p", wandb_project="own").named_project == "own"


@dataclass
class Arguments(GKDConfig):
    """As scripts write them."""

    lmbda: float = 0.75
    weights: Any = None
    num_rows: int = 7
    KINDS: ClassVar[tuple[str, ...]] = ("a",)


def test_a_scripts_own_class_of_arguments():
    args = Arguments("out", num_rows=3, weights=(1, 2), beta="0.25", dataset_name="rows")
    assert (args.output_dir, args.lmbda, args.beta, args.num_rows, args.weights) == ("out", 0.75, 0.25, 3, (1, 2))
    assert args.dataset_name == "rows" and args.to_dict()["num_rows"] == 3
    saved = Arguments(weights=[torch.nn.Linear(1, 1)]).to_dict()
    assert yaml.safe_load(yaml.safe_dump(saved))["weights"] == ["torch.nn.modules.linear.Linear"]
    with pytest.raises(ValueError, match="unknown field `num_row`; did you mean `num_rows`"):
        Arguments(num_row=3)
    with pytest.raises(ValueError, match=r"lmbda=2.0: must be in \[0, 1\]"):
        Arguments(lmbda=2)


@dataclass
class Flags(GKDConfig):
    num_rows: int = 7


def test_its_flags():
    (args,) = HfArgumentParser(Flags).parse_args_into_dataclasses(["--num_rows", "3"], look_for_args_file=False)
    assert type(args) is Flags and args.num_rows == 3


ASKED = ("trainer_callback.py", "integrations/integration_utils.py")


def test_what_transformers_own_callbacks_ask_for_is_there():
    """Every `args.name` in their files that is transformers' own; `_n_gpu` is none of a script's business."""
    folder = Path(transformers.__file__).parent
    names = {name for file in ASKED for name in re.findall(r"\bargs\.([a-z]\w+)", (folder / file).read_text())}
    names &= set(dir(TrainingArguments)) | {item.name for item in fields(TrainingArguments)}
    assert len(names) > 20
    assert {name for name in names if name not in GKDConfig.options() and name not in dir(GKDConfig)} == set()


def test_arguments_of_another_library_are_no_configuration(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(
        ValueError, match="args: transformers.*TrainingArguments is not engine's GKDConfig: import both"
    ):
        GKDTrainer(args=args)

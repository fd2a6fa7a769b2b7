"""transformers' and TRL's parsers take `GKDConfig`, and what a parser gives is what Python gives."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys

import pytest
from transformers import HfArgumentParser, IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from engine.config import GKDConfig, config_from_dict
from tests.library.paths import ROOT

OF_THE_SCRIPT = {"model_name_or_path": "student", "attn_implementation": "eager", "dataset_name": "rows",
                 "dataset_config": "main", "dataset_train_split": "a", "dataset_test_split": None,
                 "dataset_streaming": True}  # fmt: skip


def parse(words: str) -> GKDConfig:
    (config,) = HfArgumentParser(GKDConfig).parse_args_into_dataclasses(words.split(), look_for_args_file=False)
    return config


def test_no_flag_gives_the_defaults():
    assert parse("") == GKDConfig() and not parse("").has_eval_strategy


@pytest.mark.parametrize(
    "words,expected",
    [
        ("--output_dir out --lmbda 0.25 --max-steps 3", {"output_dir": "out", "lmbda": 0.25, "max_steps": 3}),
        ("--bf16", {"bf16": True}),
        ("--no_bf16 --no_gradient_checkpointing", {"bf16": False, "gradient_checkpointing": False}),
        ("--bf16 false --seq_kd", {"bf16": False, "seq_kd": True}),
        ("--eval_strategy no --save_strategy epoch", {"eval_strategy": "no", "save_strategy": "epoch"}),
        ("--report_to tensorboard", {"report_to": ["tensorboard"]}),
        ("--vocab_parallel_size 2", {"vocab_parallel_size": 2}),
        ("--vocab_parallel_size auto", {"vocab_parallel_size": "auto"}),
        ('--chat_template_kwargs {"a":1}', {"chat_template_kwargs": {"a": 1}}),
        ('--model_init_kwargs {"torch_dtype":"bfloat16"}', {"model_init_kwargs": {"dtype": "bfloat16"}}),
        ("--wandb_tags a b", {"wandb_tags": ["a", "b"]}),
        ("--teacher_placement replicated", {"teacher_placement": "replicated"}),
        ("--local_rank 1 --packing --eval_steps 0.25", {"local_rank": 1, "packing": True, "eval_steps": 0.25}),
        ("--evaluation_strategy epoch --max_seq_length 512", {"eval_strategy": "epoch", "max_length": 512}),
    ],
)
def test_flags_of_transformers_parser(words, expected):
    config = parse(words)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == GKDConfig(**expected)


def test_its_help_can_be_printed():
    assert "Probability that a step trains on samples" in HfArgumentParser(GKDConfig).format_help().replace("\n", " ")


def test_a_parser_that_was_there_changes_nothing():
    """It writes over the types of the class's fields."""
    before = {name: (option.hint, option.is_path) for name, option in GKDConfig.options().items()}
    HfArgumentParser(GKDConfig)
    code = (
        "from engine.config import GKDConfig; from transformers import HfArgumentParser; HfArgumentParser(GKDConfig);"
        "print(repr({name: (option.hint, option.is_path) for name, option in GKDConfig.options().items()}))"
    )
    after = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert after.strip() == repr(before)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trls_parser_beside_its_own_arguments(tmp_path):
    """TRL is imported in a process of its own."""
    (tmp_path / "recipe.yaml").write_text(
        "dataset_name: rows\nmodel_name_or_path: student\nlmbda: 0.25\neval_strategy: steps\nreport_to: none\n"
    )
    code = """
import json, sys
from trl import ModelConfig, ScriptArguments, TrlParser
from engine.config import GKDConfig
rows, config, model = TrlParser((ScriptArguments, GKDConfig, ModelConfig)).parse_args_and_config()
print(json.dumps([rows.dataset_name, model.model_name_or_path, config.to_dict()]))
"""
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out",
               "--lr_scheduler_type", "cosine", "--gradient_checkpointing", "--dtype", "bfloat16"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, model, fields = json.loads(done.stdout.splitlines()[-1])
    assert (rows, model) == ("rows", "student")
    expected = {"output_dir": "out", "lmbda": 0.25, "eval_strategy": "steps", "report_to": "none",
                "lr_scheduler_type": "cosine"}  # fmt: skip
    assert config_from_dict(fields) == GKDConfig(**expected)


def test_what_the_script_has_itself_is_kept_by_every_copy():
    config = GKDConfig("out", **OF_THE_SCRIPT, max_steps=3)
    assert not OF_THE_SCRIPT.keys() & {item.name for item in dataclasses.fields(GKDConfig)}
    copies = (
        copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config),
        config.with_global_batch(8), GKDConfig(**config.to_dict()),
        config_from_dict(json.loads(json.dumps(config.to_dict()))),
    )  # fmt: skip
    for other in copies:
        assert {name: getattr(other, name) for name in OF_THE_SCRIPT} == OF_THE_SCRIPT
    other = dataclasses.replace(config, dataset_name="others")
    assert other.dataset_name == "others" and other != config


def test_members_of_enumerations_are_their_values():
    config = GKDConfig(
        eval_strategy=IntervalStrategy.STEPS, lr_scheduler_type=SchedulerType.COSINE, optim=OptimizerNames.ADAMW_TORCH
    )
    assert (config.eval_strategy, config.lr_scheduler_type, config.optim) == ("steps", "cosine", "adamw_torch")
    assert all(type(value) is str for value in (config.eval_strategy, config.lr_scheduler_type, config.optim))
    assert config.eval_strategy == IntervalStrategy.STEPS  # as a callback asks


def test_output_dir_may_come_first_without_its_name():
    assert GKDConfig("out").output_dir == "out"
    with pytest.raises(TypeError, match="positional"):
        GKDConfig("out", 8)


def test_all_mistakes_are_told_at_once():
    given = {"lmda": 1, "beta": 3, "fp16": True, "max_length": "long", "max_new_tokens": 0, "seq_kdd": True}
    lines = ("unknown field `lmda`; did you mean `lmbda`?", "unknown field `seq_kdd`; did you mean `seq_kd`?",
             "max_length='long': must be of type int", "fp16=True is not supported", "beta=3.0: must be in [0, 1]",
             "max_new_tokens=0: must be positive")  # fmt: skip
    for build in (lambda: GKDConfig(**given), lambda: config_from_dict(given, "r.yaml")):
        with pytest.raises(ValueError) as error:
            build()
        told = str(error.value).removeprefix("r.yaml: ").replace("\nr.yaml: ", "\n").splitlines()
        assert len(told) == len(lines) and all(a.startswith(b) for a, b in zip(told, lines, strict=True)), told

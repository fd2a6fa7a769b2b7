"""The configuration: every value is checked, every message says what was given and what is allowed."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.cli import field_table, main, parse_overrides, read_config
from engine.config import GKDConfig, config_from_dict
from engine.config.pages import own_sections
from engine.zero.settings import resolve_deepspeed, teacher_settings
from tests.library.paths import ROOT


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"lmda": 0.5}, "unknown field `lmda`; did you mean `lmbda`"),
        ({"zzzz": 1}, "unknown field `zzzz`; `python -m engine train --help` lists"),
        ({"lmbda": 1.5}, r"lmbda=1.5: must be in \[0, 1\]"),
        ({"beta": -0.1}, r"beta=-0.1: must be in \[0, 1\]"),
        ({"temperature": 0}, "temperature=0.0: must be above 0"),
        ({"divergence": "kl"}, "divergence='kl': must be one of jsd, forward_kl"),
        ({"max_steps": 0}, "max_steps=0: must be positive, or -1"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be of type float"),
        ({"bf16": "maybe"}, "bf16='maybe': must be of type bool"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5: must be of type int"),
        ({"vocab_parallel_size": "node"}, "vocab_parallel_size='node': must be `auto` or a positive number"),
        ({"max_new_tokens": 100, "max_length": 100}, "max_new_tokens=100: must be below max_length=100"),
        ({"dataset_streaming": True}, "a stream has no length, so set max_steps"),
        ({"learning_rate": "nan"}, "learning_rate='nan': must be of type float"),
        ({"report_to": "wandb,mlflow"}, "report_to='mlflow': must be one of wandb, tensorboard, all, none"),
        ({"report_to": ["none", "wandb"]}, "report_to=.*`none` stands alone"),
        ({"wandb_tags": "[a,b]"}, r"wandb_tags='\[a,b\]': not valid JSON .*write"),
        ({"deepspeed": True}, r"deepspeed=True: must be of type dict"),
        ({"min_new_tokens": 500}, "min_new_tokens=500: must be between 0 and max_new_tokens"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(fields)


def test_values_are_coerced():
    config = config_from_dict(
        {"learning_rate": "1e-5", "bf16": "false", "max_steps": "7", "eval_steps": "none", "wandb_tags": "a,b"}
    )
    assert (config.learning_rate, config.bf16, config.max_steps, config.eval_steps) == (1e-5, False, 7, None)
    assert config.wandb_tags == ["a", "b"]
    assert config_from_dict({"vocab_parallel_size": "2"}).vocab_parallel_size == 2


@pytest.mark.parametrize("word", ["yes", "1", "on", "True", "Y", 1, True, np.bool_(True), np.int64(1)])
def test_words_for_true(word):
    assert GKDConfig(bf16=word).bf16 is True
    assert config_from_dict({"resume_from_checkpoint": word}).resume_from_checkpoint == "auto"
    assert GKDConfig(compile_loss=word).compile_loss == "on"


@pytest.mark.parametrize("word", ["no", "0", "OFF", "false", "n", 0, False, np.bool_(False)])
def test_words_for_false(word):
    assert GKDConfig(bf16=word).bf16 is False
    assert config_from_dict({"resume_from_checkpoint": word}).resume_from_checkpoint is None
    assert GKDConfig(compile_loss=word).compile_loss == "off"


@pytest.mark.parametrize("word", ["None", "null", "NONE", "", None])
def test_words_for_unset(word):
    config = config_from_dict({"run_name": word, "eval_steps": word, "resume_from_checkpoint": word, "deepspeed": word})
    assert (config.run_name, config.eval_steps, config.resume_from_checkpoint, config.deepspeed) == (None,) * 4
    with pytest.raises(ValueError, match="beta"):
        config_from_dict({"beta": word})


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"max_steps": "1e3"}, 1000),
        ({"max_steps": "-1"}, -1),
        ({"max_steps": np.int64(7)}, 7),
        ({"max_steps": 7.0}, 7),
        ({"learning_rate": np.float32(0.5)}, 0.5),
        ({"run_name": 2024}, "2024"),
        ({"run_name": datetime.date(2024, 5, 1)}, "2024-05-01"),
        ({"output_dir": Path("a/b")}, "a/b"),
        ({"wandb_tags": '["a", "b,c"]'}, ["a", "b,c"]),
        ({"wandb_tags": "a, b,"}, ["a", "b"]),
        ({"wandb_tags": ""}, []),
        ({"wandb_tags": ("a", 7)}, ["a", "7"]),
        ({"wandb_tags": np.array(["a"])}, ["a"]),
    ],
    ids=str,
)
def test_values_as_people_give_them(fields, expected):
    ((name, _),) = fields.items()
    value = getattr(config_from_dict(fields), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "given,trackers",
    [
        ("wandb", ["wandb"]),
        ("none", []),
        ("None", []),
        ([], []),
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
        ('["tensorboard"]', ["tensorboard"]),
        (("tensorboard", "wandb"), ["tensorboard", "wandb"]),
        ("all", ["wandb", "tensorboard"]),
    ],
)
def test_report_to(given, trackers):
    config = GKDConfig(report_to=given)
    assert config.report_to == trackers and config_from_dict(config.to_dict()) == config


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    names = [name for name, option in GKDConfig.options().items() if option.is_path]
    assert names == ["output_dir", "resume_from_checkpoint", "model_name_or_path", "teacher_model_name_or_path",
                     "dataset_name", "chat_template_path", "deepspeed", "teacher_deepspeed"]  # fmt: skip
    for name in names:
        assert getattr(GKDConfig(**{name: "~/x"}), name) == f"{tmp_path}/x"
        assert getattr(GKDConfig(**{name: "${SCRATCH}/x"}), name) == f"{tmp_path}/scratch/x"
        with pytest.raises(ValueError, match=f"{name}=.*: the environment variable NOWHERE is not set"):
            GKDConfig(**{name: "${NOWHERE}/x"})
    (tmp_path / "r.yaml").write_text("output_dir: $SCRATCH/run\n")
    assert read_config(Path("~/r.yaml"), {}).output_dir == f"{tmp_path}/scratch/run"


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            {"train_micro_batch_size_per_gpu": 3},
            "`train_micro_batch_size_per_gpu`=3 contradicts.*`per_device_train_batch_size` gives 8",
        ),
        ({"gradient_clipping": 0.5}, "`gradient_clipping`=0.5 contradicts.*`max_grad_norm` gives 1.0"),
        ({"bf16": {"enabled": False}}, "`bf16.enabled`=False contradicts.*`bf16` gives True"),
        ({"train_batch_size": 100}, "`train_batch_size`=100 contradicts.*x ranks` gives 16"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "`optimizer.params.lr`=1 contradicts.*`learning_rate`"),
        ({"scheduler": {"type": "OneCycle"}}, "remove `scheduler`; the field `lr_scheduler_type`"),
        ({"zero_optimization": {"stage": 2}}, "`zero_optimization.stage` must be 3"),
        ({"fp16": {"enabled": True}}, "`fp16.enabled` is not supported"),
    ],
)
def test_deepspeed_contradictions_name_both_keys(settings, message):
    base = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=message):
        resolve_deepspeed(GKDConfig(deepspeed=base | settings), world_size=2)


def test_deepspeed_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        resolve_deepspeed(GKDConfig(deepspeed=str(tmp_path / "x.json")), 1)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_deepspeed(GKDConfig(deepspeed=str(tmp_path / "x.json")), 1)
    with pytest.raises(ValueError, match="remove `optimizer`; the teacher is frozen"):
        teacher_settings(GKDConfig(teacher_deepspeed={"zero_optimization": {"stage": 3}, "optimizer": {}}))


def test_global_batch_size():
    config = GKDConfig(global_batch_size=48, per_device_train_batch_size=4)
    assert [config.accumulation_steps(world) for world in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(ValueError, match="global_batch_size=48 cannot be split over 5 ranks.*multiple of 20"):
        config.accumulation_steps(5)


def test_every_field_is_documented():
    for option in GKDConfig.options().values():
        assert option.text.endswith("."), option.name


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lmbda: 0.2\nbeta: 0.1\n")
    overrides = parse_overrides(["--lmbda", "0.7", "--seq_kd", "--max-steps=3", "--bf16", "false"])
    config = read_config(recipe, overrides)
    assert (config.lmbda, config.beta, config.seq_kd, config.max_steps, config.bf16) == (0.7, 0.1, True, 3, False)
    with pytest.raises(ValueError, match="unexpected argument 'x'"):
        parse_overrides(["x"])
    recipe.write_text("lmda: 0.2\n")
    with pytest.raises(ValueError, match="r.yaml: unknown field `lmda`"):
        read_config(recipe, {})
    with pytest.raises(ValueError, match="no such file"):
        read_config(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    "words,expected",
    [
        ("--bf16 --seq_kd", {"bf16": True, "seq_kd": True}),
        ("--bf16 off --max_steps -1", {"bf16": False, "max_steps": -1}),
        ("--no_bf16 --no-disable-dropout", {"bf16": False, "disable_dropout": False}),
        ("--resume_from_checkpoint", {"resume_from_checkpoint": "auto"}),
        ("--resume_from_checkpoint a/b --compile_loss", {"resume_from_checkpoint": "a/b", "compile_loss": "on"}),
        ("--run_name=", {"run_name": None}),
        ("--lmbda 1 --lmbda 0.25", {"lmbda": 0.25}),
        ("--report_to wandb tensorboard --seed 1", {"report_to": ["wandb", "tensorboard"], "seed": 1}),
        ('--wandb_tags ["a","b"]', {"wandb_tags": ["a", "b"]}),
        ('--deepspeed {"zero_optimization":{"stage":3}}', {"deepspeed": {"zero_optimization": {"stage": 3}}}),
    ],
)
def test_flags(words, expected):
    config = config_from_dict(parse_overrides(words.split()))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "words,message",
    [
        ("--bf16 recipe.yaml", "unexpected argument 'recipe.yaml'"),
        ("--output_dir --seq_kd", "--output_dir needs a value"),
        ("--seed", "--seed needs a value"),
        ("--no_bf16=1", "--no_bf16=1: write --bf16 1, or --no_bf16 alone"),
        ("--no_lmbda 1", "unknown field `no_lmbda`; did you mean `lmbda`"),
        ("--lmda", "unknown field `lmda`"),
    ],
)
def test_flags_that_cannot_be_meant(words, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(parse_overrides(words.split()))


def test_template_variables_are_json_on_the_command_line(tmp_path):
    overrides = parse_overrides(["--chat_template_kwargs", '{"enable_thinking": false, "level": 2}'])
    assert read_config(None, overrides).chat_template_kwargs == {"enable_thinking": False, "level": 2}
    assert GKDConfig(chat_template_kwargs={"a": None}).chat_template_kwargs == {"a": None}
    for bad in ("{", "[1]", "enable_thinking", {1: 2}):
        with pytest.raises(ValueError, match="chat_template_kwargs(=.*: must be of type dict|: not valid JSON)"):
            GKDConfig(chat_template_kwargs=bad)
    with pytest.raises(ValueError, match="chat_template_kwargs has `tools`, which the engine sets itself"):
        GKDConfig(chat_template_kwargs={"tools": []})


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert main(["train", "--lmda", "1"]) == 2
    assert capsys.readouterr().err == "error: command line: unknown field `lmda`; did you mean `lmbda`?\n"


def test_several_mistakes_are_a_line_each(capsys):
    assert main(["train", "--lmda", "1", "--fp16", "--beta", "2"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "error: command line: unknown field `lmda`; did you mean `lmbda`?"
    assert second.startswith("fp16=True is not supported") and third == "beta=2.0: must be in [0, 1]"


def test_help_needs_no_torch():
    lines = (
        "import sys",
        "from engine.cli import main",
        "try: main(['train', '--help'])",
        "except SystemExit: pass",
        "assert 'torch' not in sys.modules",
    )
    code = "\n".join(lines)
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in (option for options in own_sections().values() for option in options):
        assert f"--{option.name} " in output
    assert "engine/TRL.md" in output and "--packing" not in output


def test_configuration_md_ends_with_the_table_of_fields():
    assert (ROOT / "engine" / "CONFIGURATION.md").read_text().endswith(f"\n\n{field_table()}\n")


def test_config_round_trips_as_json():
    config = GKDConfig(beta=0.25, wandb_tags=["x"])
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "path,message",
    [
        ("${NO_SUCH_VARIABLE}/run", "NO_SUCH_VARIABLE is not set"),
        ("~no_such_user/run", "no user"),
        ("${}/run", "written"),
    ],
)
def test_paths_that_cannot_be_filled_in(path, message):
    with pytest.raises(ValueError, match=message):
        GKDConfig(output_dir=path)


def test_a_deepspeed_file_that_is_no_text(tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="deepspeed=.*ds.json.*cannot be read"):
        resolve_deepspeed(GKDConfig(deepspeed=str(tmp_path / "ds.json")), 1)

"""TRL's fields: each has a treatment, its type and default are TRL's, and what is accepted or refused is told."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.util
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from engine.config import GKDConfig, config_from_dict
from engine.config.accepted import AcceptedFields
from engine.config.options import options_of
from engine.config.pages import own_sections
from engine.config.refused import HARMLESS, RefusedFields
from engine.config.renamed import RENAMED, RenamedFields
from engine.config.trl import MAPPED, SAME, treatments, trl_table
from tests.library.paths import ROOT

TRL = importlib.util.find_spec("trl")
needs_trl = pytest.mark.skipif(TRL is None, reason="TRL's files are not installed")
CLASSES = {"trainer/base_config.py": "_BaseConfig", "trainer/sft_config.py": "SFTConfig",
           "experimental/gkd/gkd_config.py": "GKDConfig"}  # fmt: skip
# With a field's own default stands, in the table's sentence or here, why it is another than TRL's.
OWN_DEFAULTS = {
    "output_dir": "TRL's None becomes trainer_output too",
    "bf16": "TRL's None becomes True too",
    "include_num_input_tokens_seen": "TRL's `no` and False are one",
    "include_for_metrics": "refused: unset and empty are one",
    "debug": "unset and empty are one",
    "report_to": MAPPED["report_to"],
    "ddp_timeout": "another name of timeout_s, which has the engine's default",
}
OWN_TYPES = {
    "gradient_checkpointing": "None as well, as transformers has it",
    "liger_kernel_config": "JSON as well",
    "trackio_static_space_id": "False is off by being false",
    "eval_strategy": "None as well, for unset",
    "include_for_metrics": "None as well",
    "save_steps": "None as well, for no checkpoints",
    "parallelism_config": "whatever it is, it is refused",
    "ddp_timeout": "None as well, for unset",
    "debug": "None as well",
    "max_length": "None is refused",
}


def trl_fields() -> dict[str, tuple[Any, Any]]:
    """Type and default of each field: transformers' from its class, TRL's from the text of its files."""
    hints = typing.get_type_hints(TrainingArguments)
    fields = {
        item.name: (hints[item.name], item.default if item.default is not dataclasses.MISSING else [])
        for item in dataclasses.fields(TrainingArguments)
        if item.init
    }
    for path, name in CLASSES.items():
        tree = ast.parse((Path(TRL.submodule_search_locations[0]) / path).read_text())
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for line in found.body:
            if isinstance(line, ast.AnnAssign):
                (default,) = (ast.literal_eval(word.value) for word in line.value.keywords if word.arg == "default")
                fields[line.target.id] = eval(ast.unparse(line.annotation), {"Any": Any}), default
    return fields


def members(hint: Any) -> set[Any]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    is_enum = [isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds]
    return {str if known else typing.get_origin(kind) or kind for kind, known in zip(kinds, is_enum, strict=True)}


@needs_trl
def test_every_field_of_trl_has_one_treatment():
    names, table = set(trl_fields()), treatments()
    assert len(names) == 143 and names <= table.keys()
    assert names <= GKDConfig.options().keys()
    kinds = [SAME, MAPPED, *(options_of(kind) for kind in (RenamedFields, AcceptedFields, RefusedFields))]
    assert len(table) == sum(map(len, kinds)) and table.keys() <= GKDConfig.options().keys()
    # beside TRL 1.16's, the mapped ones are what older versions had
    assert SAME <= names and MAPPED.keys() - names == {"warmup_ratio", "overwrite_output_dir"}
    assert {treatment.kind for treatment in table.values()} == {"same", "mapped", "accepted", "refused"}
    assert all(treatment.sentence.endswith(".") for treatment in table.values())


@needs_trl
def test_types_and_defaults_are_trls():
    options, own_types, own_defaults = GKDConfig.options(), set(), set()
    for name, (hint, default) in trl_fields().items():
        option = options[name]
        if members(hint) != members(option.hint):
            own_types.add(name)
        if (default.value if isinstance(default, enum.Enum) else default) != option.default:
            own_defaults.add(name)
    assert own_types == OWN_TYPES.keys() and own_defaults == OWN_DEFAULTS.keys()


@needs_trl
def test_trls_defaults_are_all_taken():
    config = GKDConfig(**{name: default for name, (_, default) in trl_fields().items()})
    assert config.accepted_sentence is None and config.report_to == []
    assert config == GKDConfig(report_to="none", eval_strategy="no", timeout_s=1800)
    assert config.has_eval_strategy and not GKDConfig().has_eval_strategy


def test_trl_md_ends_with_the_table():
    assert (ROOT / "engine" / "TRL.md").read_text().endswith(f"\n\n{trl_table()}\n")


def another_value(option: Any) -> Any:
    kinds = members(option.hint)
    if bool in kinds:
        return not option.default
    return 7 if kinds & {int, float} else {"a": 1} if dict in kinds else "other"


@pytest.mark.parametrize("option", options_of(RefusedFields).values(), ids=lambda option: option.name)
def test_what_is_refused_says_what_to_do_instead(option):
    with pytest.raises(ValueError) as error:
        GKDConfig(**{option.name: another_value(option)})
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{option.name}=") and line.endswith(option.text) and "not supported" in line
    for value in (option.default, *HARMLESS.get(option.name, ())):
        assert getattr(GKDConfig(**{option.name: value}), option.name) == value
    if not option.default:
        GKDConfig(**{option.name: False})


def test_an_object_is_refused_with_the_sentence():
    class AcceleratorConfig: ...

    with pytest.raises(
        ValueError, match="accelerator_config=.*AcceleratorConfig.* is not supported. Accelerate is not"
    ):
        GKDConfig(accelerator_config=AcceleratorConfig())


def test_what_is_accepted_is_told_in_one_line():
    options = {name: option for name, option in options_of(AcceptedFields).items() if not name.endswith("_kwargs")}
    given = {name: another_value(option) for name, option in options.items()}
    sentence = GKDConfig(
        **given, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing_kwargs={"use_reentrant": False}
    ).accepted_sentence
    assert "\n" not in sentence
    for name, option in options_of(AcceptedFields).items():
        assert f"{name} ({option.text[:-1]})" in sentence
    assert GKDConfig().accepted_sentence is None
    assert GKDConfig(packing=True).accepted_sentence.count("(") == 1


def test_what_is_set_is_kept_and_what_is_not_left_out():
    config = GKDConfig(packing=True, dataloader_num_workers=4)
    assert config.to_dict()["packing"] is True and "padding_free" not in config.to_dict()
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "old,given,expected",
    [
        ("activation_checkpointing", False, False),
        ("activation_checkpointing_kwargs", '{"use_reentrant": false}', {"use_reentrant": False}),
        ("ddp_timeout", 1800, 1800),
        ("evaluation_strategy", "epoch", "epoch"),
        ("max_seq_length", 512, 512),
        ("no_cuda", True, True),
        ("per_gpu_train_batch_size", 2, 2),
        ("per_gpu_eval_batch_size", 2, 2),
        ("push_to_hub_model_id", "a/b", "a/b"),
        ("push_to_hub_token", "secret", "secret"),
    ],
)
def test_another_name_is_the_field(old, given, expected):
    new = RENAMED[old]
    config = GKDConfig(**{old: given})
    assert getattr(config, new) == expected and getattr(config, old) is None
    assert config == GKDConfig(**{new: given}) == dataclasses.replace(config)
    assert getattr(GKDConfig(**{old: given, new: given}), new) == expected


def test_every_other_name_is_tried_above():
    (mark,) = test_another_name_is_the_field.pytestmark
    assert {old for old, _, _ in mark.args[1]} == RENAMED.keys()


def test_two_names_with_two_values():
    with pytest.raises(
        ValueError, match="max_seq_length and max_length are one field, and got 512 and 256: give max_l"
    ):
        GKDConfig(max_seq_length=512, max_length=256)
    with pytest.raises(ValueError, match="got two values: give hub_token alone") as error:
        GKDConfig(push_to_hub_token="first", hub_token="second")
    assert "first" not in str(error.value)
    with pytest.raises(ValueError, match="evaluation_strategy: eval_strategy='often': must be one of no, steps, epoch"):
        GKDConfig(evaluation_strategy="often")


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"push_to_hub_organization": "lab", "output_dir": "runs/small"}, "lab/small"),
        ({"push_to_hub_organization": "lab", "push_to_hub_model_id": "student"}, "lab/student"),
    ],
)
def test_an_organization_is_the_first_part_of_the_name(fields, expected):
    assert GKDConfig(**fields).hub_model_id == expected


def test_arguments_of_recomputation_that_would_be_passed_over():
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs=.*use_reentrant=false alone is allowed"):
        GKDConfig(gradient_checkpointing_kwargs={"preserve_rng_state": False})


def test_arguments_of_a_dataset_that_would_be_passed_over():
    GKDConfig(dataset_kwargs={"add_special_tokens": False, "append_concat_token": False})
    with pytest.raises(ValueError, match="dataset_kwargs=.*: add_special_tokens has no meaning here"):
        GKDConfig(dataset_kwargs={"add_special_tokens": True})


def test_a_token_is_neither_shown_nor_saved():
    config = GKDConfig(hub_token="secret")
    assert "secret" not in f"{config!r}{config.to_dict()}{config.to_json_string()}"
    assert dataclasses.replace(config).hub_token == "secret"


# Asked by scripts alone, by transformers' TrainerState and its flow; `completion_only_loss` is checked, and no more.
NOT_READ = {"do_train", "do_predict", "eval_steps", "logging_steps", "logging_first_step", "completion_only_loss"}


def test_no_field_is_without_effect():
    """Each option that is not accepted, refused or another name is read somewhere beside its check."""
    files = (path for path in (ROOT / "engine").rglob("*.py") if path.name != "checks.py")
    text = "\n".join(path.read_text() for path in files)
    names = {option.name for options in own_sections().values() for option in options}
    assert {name for name in names - NOT_READ if not re.search(rf"\.{name}\b|, \"{name}\"\)", text)} == set()

"""One value as its field has it (type, choices, paths filled in, words that stand for others), and as a file has it."""

from __future__ import annotations

import importlib.util
from typing import Any

from engine.config.options import Option
from engine.config.run import TRACKERS, UnsetStrategy
from engine.paths import expand_path
from engine.values import as_bool, coerce


def read_value(option: Option, value: Any) -> Any:
    """A value as the field's type has it. ValueError where it cannot be that, or is none of the field's choices."""
    name = option.name
    if value is None and option.none_is_default:
        return option.default
    if name == "max_length" and value is None:
        raise ValueError("max_length=None: must be a number of tokens, which bounds the memory of a step")
    if option.words is not None and as_bool(value) is not None:
        value = option.words.true if as_bool(value) else option.words.false
    if not isinstance(value, UnsetStrategy):
        value = coerce(name, value, option.hint)
    if isinstance(value, str) and option.is_object:
        raise ValueError(f"{name}={value!r}: must be of type dict, or JSON text of one")
    for one in value if isinstance(value, list) else [value]:
        if option.choices is not None and one is not None and one not in option.choices:
            raise ValueError(f"{name}={one!r}: must be one of {', '.join(map(str, option.choices))}")
    if option.is_path and isinstance(value, str):
        value = expand_path(value, name)
    if name == "report_to":
        return chosen_trackers(value)
    if name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        return _new_names(value)
    return value


def _new_names(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of `from_pretrained`, where `torch_dtype` is called `dtype` now."""
    if values is None or "torch_dtype" not in values:
        return values
    return {"dtype": values["torch_dtype"]} | {key: value for key, value in values.items() if key != "torch_dtype"}


def saved_value(value: Any) -> Any:
    """A value as YAML and JSON have it; of an object its class, which is alike on every rank."""
    if isinstance(value, UnsetStrategy):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): saved_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [saved_value(item) for item in value]
    return f"{type(value).__module__}.{type(value).__qualname__}"


def chosen_trackers(given: list[str] | None) -> list[str]:
    """The trackers that `report_to` names: none of them for `none`, every one that is installed for `all`."""
    names = given or ["none"]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to={name!r}: must be one of {', '.join(TRACKERS)}")
    special = [name for name in names if name in ("all", "none")]
    if special and len(set(names)) > 1:
        raise ValueError(f"report_to={names!r}: `{special[0]}` stands alone")
    if names == ["all"]:
        return [name for name in ("wandb", "tensorboard") if importlib.util.find_spec(name) is not None]
    return [name for name in dict.fromkeys(names) if name != "none"]

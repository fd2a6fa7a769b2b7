"""Values of fields: what YAML, a command line or Python gives, as the type that the field's annotation names.

It knows types and words, no field's meaning. Imports neither torch nor numpy.
"""

from __future__ import annotations

import datetime
import enum
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

WORDS = {"true": True, "yes": True, "on": True, "1": True, "y": True, "t": True,
         "false": False, "no": False, "off": False, "0": False, "n": False, "f": False}  # fmt: skip
UNSET = ("none", "null", "")


def plain(value: Any) -> Any:
    """numpy's scalars and arrays, members of enumerations and torch's dtypes as Python's own, also inside a dict."""
    if isinstance(value, enum.Enum):
        return value.value
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if type(value).__module__ == "numpy" else value


def as_bool(value: Any) -> bool | None:
    """A truth value, one of `WORDS` in any case, or 0 or 1; else None."""
    return WORDS.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of the annotation `hint`; YAML's "1e-5" becomes a float, "yes" a bool, "a,b" a list.

    Raises:
        ValueError: where the value cannot be of that type; the text begins with `name`.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    is_list = any(typing.get_origin(kind) is list for kind in kinds)
    if value is None or isinstance(value, str) and value.strip().lower() in UNSET:
        if type(None) in kinds:
            return None
        if is_list:
            return []
        if not value:
            raise ValueError(f"{name} is empty: must be of type {describe(hint)}")
    for kind in kinds:
        try:
            return _as_kind(name, value, kind)
        except (TypeError, OverflowError):
            continue  # another member of the union may fit
    raise ValueError(f"{name}={value!r}: must be of type {describe(hint)}")


def describe(hint: Any) -> str:
    """An annotation in a user's words; the values of a `Literal` are told by whoever checks them."""
    if typing.get_origin(hint) is typing.Literal:
        return "str"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """TypeError where the value is not of that kind; ValueError where it is meant to be, and malformed."""
    origin = typing.get_origin(kind)
    if kind is bool and as_bool(value) is not None:
        return as_bool(value)
    if kind in (int, float) and not isinstance(value, bool):
        return _as_number(value, kind)
    if (
        (kind is str or origin is typing.Literal)
        and isinstance(value, (str, Path, int, float, datetime.date))
        and not isinstance(value, bool)
    ):
        return str(value)  # YAML reads a name such as 2024 as a number
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    if origin is dict and isinstance(value, str) and value.lstrip().startswith("{"):
        return parse_json(value, name)
    if origin is list and isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    if origin is list and isinstance(value, str):
        return _as_list(name, value)
    raise TypeError


def _as_number(value: Any, kind: type) -> int | float:
    try:
        number = float(value)
    except ValueError as error:
        raise TypeError from error
    if not math.isfinite(number) or kind is int and not number.is_integer():
        raise TypeError
    return (value if isinstance(value, int) else int(number)) if kind is int else number


def _as_list(name: str, text: str) -> list[str]:
    """`a,b` or `["a", "b"]`."""
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return [str(item) for item in json.loads(text)]
    except ValueError as error:
        raise ValueError(f'{name}={text!r}: not valid JSON ({error}); write ["a", "b"], or a,b') from error


def parse_json(text: str, name: str) -> dict[str, Any]:
    """A JSON object written out in `text`; ValueError where it is none, or has a key twice."""
    try:
        settings = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: must hold a JSON object, holds a {type(settings).__name__}")
    return settings


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key `{twice[0]}` occurs twice")
    return dict(pairs)

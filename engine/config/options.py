"""How a field is declared, and what the fields of a class are: type, default, sentence, section. Knows no field.

A field's metadata is what transformers' `HfArgumentParser` hands to argparse (`help`, `choices`) and nothing else: the
parser rejects other keys. What only the engine asks (is it a path, what are true and false to it) stands in the
annotation, as `Annotated`. The parser also overwrites `Field.type`, so types are read from the annotations.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

IS_PATH = "a path: `~` and `${VAR}` are filled in"
NONE_IS_DEFAULT = "None stands for the default"

PathText = Annotated[str, IS_PATH]
T = TypeVar("T")
if TYPE_CHECKING:
    OrDefault = Annotated[T, NONE_IS_DEFAULT]
    OfTheScript = Annotated[T, "InitVar"]
    JsonObject = dict[str, Any]
    SizeOrAuto = int | str
    Names = list[str]
else:
    OrDefault = Annotated[T | None, NONE_IS_DEFAULT]
    # What TRL's ScriptArguments and ModelConfig have as well: argparse takes a flag from one class only. A constructor
    # argument that is no field is passed over by HfArgumentParser, and by nothing of the engine.
    OfTheScript = InitVar
    # HfArgumentParser takes a union for text where it has str and None.
    JsonObject = Annotated[dict[str, Any] | str | None, NONE_IS_DEFAULT]
    SizeOrAuto = Annotated[int | str | None, NONE_IS_DEFAULT]
    Names = list[str] | str | None


@dataclass(frozen=True)
class Words:
    """What true and false mean to a field that is not a bool."""

    true: str | None
    false: str | None


def option(default: Any, text: str, choices: tuple[str, ...] | None = None, is_secret: bool = False) -> Any:
    """A config field: `text` is its one-sentence documentation (unit and effect). A secret is never shown or saved."""
    metadata: dict[str, Any] = {"help": text.replace("%", "%%")}  # argparse formats it
    if choices is not None:
        metadata["choices"] = choices
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True)
class Option:
    """A field as the engine reads it. `hint` is its plain type, `section` the class that declares it."""

    name: str
    hint: Any
    text: str
    section: type
    choices: tuple[str, ...] | None
    is_path: bool
    words: Words | None
    none_is_default: bool
    is_of_script: bool
    is_secret: bool
    _field: dataclasses.Field

    @property
    def is_object(self) -> bool:
        """Whether it is a dict, and text means JSON of one."""
        return not self.is_path and any(typing.get_origin(kind) is dict for kind in _members(self.hint))

    @property
    def default(self) -> Any:
        made = self._field.default_factory
        return self._field.default if made is dataclasses.MISSING else made()


def section_title(section: type) -> str:
    """The first line of a section's docstring, without its full stop."""
    return (section.__doc__ or "").splitlines()[0].rstrip(".")


@functools.cache
def options_of(kind: Any) -> Mapping[str, Option]:
    """Every option of a dataclass by name, in the order of the sections, those of the script included.

    Fields that a script's own subclass adds are in it, whatever their type, and need no sentence.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    classes = reversed(kind.__mro__)
    sections = {name: section for section in classes for name in vars(section).get("__annotations__", ())}
    options = {}
    for name, item in kind.__dataclass_fields__.items():
        hint, of_script = hints[name], isinstance(hints[name], InitVar)
        if hint is ClassVar or typing.get_origin(hint) is ClassVar:
            continue
        marks = _marks(hint.type if of_script else hint)
        plain = _plain(hint.type if of_script else hint)
        literals = [kind for kind in _members(plain) if typing.get_origin(kind) is typing.Literal]
        choices = item.metadata.get("choices", typing.get_args(literals[0]) if literals else None)
        options[name] = Option(
            name, plain, item.metadata.get("help", "").replace("%%", "%"), sections[name], choices, IS_PATH in marks,
            next((mark for mark in marks if isinstance(mark, Words)), None), NONE_IS_DEFAULT in marks, of_script,
            not item.repr, item,
        )  # fmt: skip
    return types.MappingProxyType(options)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _marks(hint: Any) -> tuple[Any, ...]:
    """All that `Annotated` says, at any depth of a union."""
    if typing.get_origin(hint) is Annotated:
        return (*hint.__metadata__, *_marks(hint.__origin__))
    members = _members(hint)
    return tuple(mark for member in members for mark in _marks(member)) if len(members) > 1 else ()


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) is Annotated:
        return _plain(hint.__origin__)
    members = _members(hint)
    return functools.reduce(operator.or_, map(_plain, members)) if len(members) > 1 else hint

"""Messages: a checked list of plain dicts from whatever a row has, as chat templates want it.

Content becomes one text, tool calls get their arguments as dicts, and what a message says about being trained on is
read and taken out. Errors name the message. No tokenizer, no template, no rows here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
ROLES = ("system", "user", "assistant", "tool")
TRAIN_FLAGS = ("weight", "train_on_turn", "loss", "train")  # OpenAI and Mistral, Axolotl, ms-swift, Axolotl again
REFUSED_KEYS = ("label", "train_detail", "prefix", *MEDIA)
# What this engine reads of a message; any other key is for the chat template.
MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning"}
SHAREGPT = (
    "is ShareGPT's form: give `messages` with `role` and `content` instead (`from`: human becomes user, gpt becomes "
    "assistant; `value` becomes `content`), for example by `datasets.map` before training"
)


def check_messages(
    messages: Any, place: str, column: str, from_arrow: bool
) -> tuple[list[dict[str, Any]], dict[int, bool | None]]:
    """The messages as plain dicts without empty keys, and for each whether it is trained on (None: not said)."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{place}: `{column}` must be a list of messages with at least one, is {messages!r:.80}")
    checked, trained = [], {}
    for number, message in enumerate(messages, start=1):
        where = f"{place}: {column} {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be a dict with `role` and `content`, is {message!r:.80}")
        if "role" not in message and "from" in message:
            raise ValueError(f"{where} {SHAREGPT}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has role {role!r}: must be one of {', '.join(ROLES)}")
        where = f"{where} ({role})"
        kept = {key: value for key, value in message.items() if value is not None}
        for key in REFUSED_KEYS:
            if is_filled(kept.get(key)):
                raise ValueError(f"{where}: `{key}` means something to other tools and nothing here: remove it")
        if is_filled(kept.get("function_call")):
            raise ValueError(f"{where}: `function_call` is OpenAI's older form: give `tool_calls`, a list of calls")
        trained[number - 1] = read_train_flags(kept, where)
        checked.append(check_message(kept, where, from_arrow))
    return checked, trained


def check_message(message: dict[str, Any], where: str, from_arrow: bool) -> dict[str, Any]:
    """The message with its content as one text, its tool calls decoded, and nothing that only other tools read."""
    role = message["role"]
    kept = {key: without_nulls(value) if from_arrow else value for key, value in message.items()
            if key not in TRAIN_FLAGS and key not in REFUSED_KEYS}  # fmt: skip
    calls = read_tool_calls(kept.pop("tool_calls", None), where)
    if calls and role != "assistant":
        raise ValueError(f"{where}: has `tool_calls`, which only an assistant turn can have")
    if "content" in kept:
        kept["content"] = join_parts(kept["content"], where)
    if calls:
        kept = {"content": ""} | kept | {"tool_calls": calls}
    check_text(kept.get("content"), f"{where}: content", may_be_empty=bool(calls) or role in ("system", "tool"))
    for name in ("reasoning_content", "thinking", "reasoning"):
        check_texts(kept.get(name), f"{where}: {name}")
    return kept


def read_train_flags(message: dict[str, Any], where: str) -> bool | None:
    """Whether the message is to be trained on; None where it does not say."""
    said: dict[str, bool] = {}
    for name in TRAIN_FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{where}: {name}={value!r:.40}: must be 0 or false (context) or 1 or true (trained on)")
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(f'{k}={v}' for k, v in said.items())} contradict each other")
    if message["role"] != "assistant" and any(said.values()):
        name = next(iter(said))
        raise ValueError(f"{where}: {name}={message[name]!r}: only assistant turns are trained on; remove it")
    return next(iter(said.values()), None)


def join_parts(content: Any, where: str) -> Any:
    """The text of a content that is a list of text parts; anything else as it is."""
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = f"of type {kind!r}" if isinstance(kind, str) else f"{part!r:.40}"
            raise ValueError(f"{where}: content has a part {shown}: this engine trains on text alone")
        texts.append(part["text"])
    return "".join(texts)


def read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as dicts, as chat templates want them; OpenAI's form has them as JSON text."""
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}: tool_calls must be a list, is {calls!r:.80}")
    decoded = []
    for number, call in enumerate(calls, start=1):
        what = f"{where}: tool call {number}"
        if not isinstance(call, Mapping):
            raise ValueError(f"{what} must be a dict with a name and arguments, is {call!r:.80}")
        call = dict(call)
        function = call["function"] if isinstance(call.get("function"), Mapping) else call
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what} has no name of a function: {call!r:.80}")
        arguments = read_json(function.get("arguments"), f"{what} ({name}): arguments")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{what} ({name}): arguments must be a dict or its JSON text, is {arguments!r:.80}")
        check_texts(arguments, f"{what} ({name}): arguments")
        function = {**function, "arguments": dict(arguments)}
        decoded.append(function if "function" not in call else {**call, "function": function})
    return decoded


def read_json(value: Any, what: str) -> Any:
    """What a JSON text says; anything but text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON ({error})") from error


def without_nulls(value: Any) -> Any:
    """The value without null entries of its dicts at any depth; a list keeps its nulls, which no other row adds."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def check_text(value: Any, what: str, may_be_empty: bool = False) -> None:
    if value is None:
        raise ValueError(f"{what} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, is a {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{what} is empty")
    broken = first_surrogate(value)
    if broken is not None:
        raise ValueError(f"{what} has {value[broken]!a} at character {broken + 1}, half of a pair: not valid text")


def check_texts(value: Any, what: str) -> None:
    """As `check_text`, for every text inside a value, which may be empty."""
    if isinstance(value, str):
        check_text(value, what, may_be_empty=True)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_texts(key, what)
            check_texts(item, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_texts(item, what)


def first_surrogate(text: str) -> int | None:
    """Place of the first lone surrogate, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def is_filled(value: Any) -> bool:
    """Whether a column says something: not null, not empty, not a list of nulls."""
    if isinstance(value, (list, tuple)):
        return any(map(is_filled, value))
    return value is not None and value != "" and value != {}

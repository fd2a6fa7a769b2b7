"""Whether a rendered conversation says all that the assistant says: texts, reasoning and tool calls.

A template that leaves something out would train the student on something else than the row says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from engine.data.marks import Message, Piece, Rendering, Span
from engine.data.template import ChatTemplate


def require_all_texts(chat: ChatTemplate, messages: list[Message], whole: Rendering, notes: Counter[str]) -> None:
    """Every text is in the rendering: ValueError where one of the assistant's is not, a note where another's is not.

    What a template leaves out of earlier turns only, as models do that forget how they came to an answer, is a note.
    """
    missing = [piece for piece in whole.marked if piece not in whole.spans]
    forgotten: dict[tuple[bool, bool], bool] = {}  # for reasoning or text, of turns with calls or without
    for piece in missing:
        message = messages[piece.message]
        if message["role"] != "assistant":
            notes[f"the chat template leaves out the text of a {message['role']} message"] += 1
            continue
        kind = (piece.is_reasoning, bool(message.get("tool_calls")))
        what = "reasoning" if piece.is_reasoning else "text"
        if piece.message < len(messages) - 1 and kind not in forgotten:
            forgotten[kind] = is_written_last(chat, messages, piece)
        if not forgotten.get(kind, False) or piece.message == len(messages) - 1:
            does = "writes more than once" if piece in whole.repeated else "leaves out"
            raise ValueError(
                f"the chat template {does} the {what} of message {piece.message + 1} (assistant): the student would "
                "learn something else than the row says. Remove it from the row, or use another template"
            )
        notes[f"the chat template leaves the {what} of earlier assistant turns out"] += 1
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            require_calls(chat, messages, whole, number)


def require_tools(chat: ChatTemplate, text: str) -> None:
    """ValueError where the template does not write the tools that it is given."""
    for tool in chat.given.tools or []:
        name = tool.get("function", tool).get("name")
        if not isinstance(name, str) or name not in text:
            raise ValueError(
                f"the chat template does not write the tools ({name!r} is not in what it writes): use a template for "
                "tool calls, or describe the tools in a system message"
            )


def is_written_last(chat: ChatTemplate, messages: list[Message], piece: Piece) -> bool:
    """Whether the template writes a text where its message is the last one."""
    cut = messages[: piece.message + 1]
    alone = chat.render_marked(cut, is_marked=lambda message: message is cut[-1])
    wanted = [p for p in alone.marked if p.is_reasoning == piece.is_reasoning]
    return all(p in alone.spans for p in wanted)


def require_calls(chat: ChatTemplate, messages: list[Message], whole: Rendering, number: int) -> int:
    """Where the last text of a message's tool calls ends; ValueError where one is not in the rendering.

    The message's own text does not count: it may say what it is about to call.
    """
    start, stop = room_of(messages, whole, number)
    region = whole.text[start:stop]
    for (first, last), _ in whole.by_message.get(number, []):
        region = region[: first - start] + "\0" * (last - first) + region[last - start :]
    end = 0
    for call in messages[number]["tool_calls"]:
        function, begin = call["function"], end
        for text in [function["name"], *texts_of(function.get("arguments"))]:
            forms = {text, text.strip(), json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
            found = [place + len(form) for form in forms if (place := region.find(form, begin)) >= 0]
            if not found or not chat.shape.writes_calls:
                raise ValueError(
                    f"the chat template leaves out the tool call of message {number + 1} ({text!r:.60} is not in what "
                    "it writes): use a template for tool calls, or remove the call from the row"
                )
            end = max(end, *found)
    return start + end


def with_function_calls(message: Message, number: int) -> Message:
    """The message with its tool calls in OpenAI's form, `{"type": "function", "function": {"name", "arguments"}}`.

    Raises:
        ValueError: for a call without a function's name.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {number + 1}: a tool call must name its function, is {call!r:.80}")
        around = call if function is not call else {}
        calls.append({"type": "function", **around, "function": {"arguments": {}, **function}})
    return message | {"tool_calls": calls}


def texts_of(value: Any) -> Iterator[str]:
    """The texts, figures and names inside the arguments of a tool call; of truth values and nulls, which templates
    write in their own ways, none."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield str(value)


def room_of(messages: list[Message], whole: Rendering, number: int) -> Span:
    """Characters between the texts of the messages before and after message `number`."""
    before = next((end for i in range(number - 1, -1, -1) if (end := whole.end_of(i)) is not None), 0)
    after = next((whole.by_message[i] for i in range(number + 1, len(messages)) if i in whole.by_message), None)
    return before, len(whole.text) if after is None else after[0][0][0]

"""What a row must look like: `parse_row` turns the dict of any source into a checked `Row`, or says what is wrong.

Four kinds: `messages` (role and content of each turn), `prompt` with `completion` (both text, or both lists of
messages), prompts only (`prompt` alone, or `messages` that end before an answer), and sequences without a prompt of
their own (`input_ids`, or a text). A field to which other tools
give a meaning is honoured or refused by name, never passed over. No tokenizer, no template, no ranks here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import RESERVED_TEMPLATE_KWARGS
from engine.data.messages import MEDIA, SHAREGPT, check_messages, check_text, is_filled, read_json, without_nulls
from engine.data.tokens import MASKS, TOKEN_COLUMNS, read_tokens

# What is read of a row; a dataset's other columns are never decoded.
COLUMNS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs", "conversations", "conversation",
           "system", "label", "weight", "functions", *TOKEN_COLUMNS, *MEDIA)  # fmt: skip

SCORED_BY = ("labels", *MASKS)


@dataclass(frozen=True)
class Row:
    """One checked row: a conversation, a plain-text prompt with or without its completion, token ids, or a text.

    Attributes:
        responses: numbers of the assistant messages to train on, from 0; the others are context. Where there are
            any, the last message is one of them.
        tools, template_kwargs: what goes into the chat template beside the messages.
        input_ids, scored: the row's token ids, and which are scored; None where it does not say.
        text: the whole of a row that has neither messages nor prompt.
        notes: what the user should be told about rows like this one.
    """

    place: str
    messages: list[dict[str, Any]] | None = None
    responses: tuple[int, ...] = ()
    prompt: str = ""
    completion: str | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    input_ids: list[int] | None = None
    scored: list[bool] | None = None
    text: str | None = None
    notes: tuple[str, ...] = ()


def parse_row(raw: Any, place: str, from_arrow: bool = False, text_field: str = "text") -> Row:
    """A checked `Row`. With `from_arrow`, nulls inside dicts are the padding of other rows' keys, and dropped.

    Token ids that say which of them are scored win over messages, as in TRL; `text_field` is read where there is
    nothing else.

    Raises:
        ValueError: for a row of another shape; the text starts with `place`.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{place}: a row must be a dict, is a {type(raw).__name__}")
    refuse_columns(raw, place)
    messages, prompt, completion = (raw.get(name) for name in ("messages", "prompt", "completion"))
    has_more = messages is not None or prompt is not None
    if raw.get("input_ids") is not None and (not has_more or any(raw.get(name) is not None for name in SCORED_BY)):
        input_ids, scored = read_tokens(raw, place)
        notes = ("`input_ids` win over `messages` or `prompt`, which are not used",) if has_more else ()
        return Row(place, input_ids=input_ids, scored=scored, notes=notes)
    tools = read_tools(raw.get("tools"), place, from_arrow)
    template_kwargs = read_template_kwargs(raw.get("chat_template_kwargs"), place, from_arrow)
    notes = ()
    if messages is None and isinstance(prompt, str):
        if tools or template_kwargs:
            raise ValueError(
                f"{place}: `tools` and `chat_template_kwargs` go into the chat template, which a `prompt` of plain "
                "text does not pass: give `messages`"
            )
        check_text(prompt, f"{place}: prompt")
        if completion is not None:
            check_text(completion, f"{place}: completion")
        return Row(place, prompt=prompt, completion=completion)
    if messages is not None:
        if prompt is not None or completion is not None:
            other = "prompt" if prompt is not None else "completion"
            notes = (f"`messages` win over `{other}`, which is not used",)
        checked, trained = check_messages(messages, place, "messages", from_arrow)
    elif prompt is not None:
        checked, trained = check_messages(prompt, place, "prompt", from_arrow)
        if any(trained.values()):
            raise ValueError(
                f"{place}: `prompt` has a message with a weight above 0, and is context as a whole: put what follows "
                "the context into `completion`"
            )
    elif raw.get(text_field) is not None:
        check_text(raw[text_field], f"{place}: {text_field}")
        return Row(place, text=raw[text_field])
    else:
        columns = ", ".join(map(str, raw)) or "none"
        raise ValueError(
            f"{place}: needs `messages`, or `prompt` and `completion`, or `prompt`, or `input_ids` with `labels`; its "
            f"columns: {columns}"
        )
    check_ends(checked, place, "prompt" if messages is None else "messages")
    if messages is not None:
        checked, responses = choose_responses(checked, trained, place)
    elif completion is None:
        responses = ()
    else:
        checked, responses = join_completion(checked, completion, place, from_arrow)
    return Row(place, checked, responses, tools=tools, template_kwargs=template_kwargs, notes=notes)


def refuse_columns(raw: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for a column that has a meaning elsewhere and none here."""
    for name in MEDIA:
        if is_filled(raw.get(name)):
            raise ValueError(f"{place}: `{name}` has content: this engine trains on text alone")
    if raw.get("messages") is None and raw.get("prompt") is None:
        for name in ("conversations", "conversation"):
            turns = raw.get(name)
            if not is_filled(turns):
                continue
            first = turns[0] if isinstance(turns, (list, tuple)) else None
            if isinstance(first, Mapping) and "role" in first:
                raise ValueError(f"{place}: rename the column `{name}` to `messages`")
            raise ValueError(f"{place}: `{name}` {SHAREGPT}")
    if isinstance(raw.get("label"), bool) and raw.get("completion") is not None:
        raise ValueError(
            f"{place}: `label` marks good and bad completions, which would be trained on alike: keep the rows with "
            "label true and remove the column"
        )
    if is_filled(raw.get("functions")):
        raise ValueError(f"{place}: `functions` is OpenAI's older form: give `tools`")
    if raw.get("weight") is not None and raw["weight"] != 1:
        raise ValueError(
            f"{place}: weight={raw['weight']!r:.40} for a whole row is not taken: leave the row out, or give its "
            "messages a weight"
        )
    system = raw.get("system")
    if isinstance(system, str) and system.strip() and not starts_with_system(raw.get("messages")):
        raise ValueError(f"{place}: `system` has text: make it the first of the `messages`, with role system")


def starts_with_system(messages: Any) -> bool:
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else None
    return isinstance(first, Mapping) and first.get("role") == "system"


def join_completion(
    prompt: list[dict[str, Any]], completion: Any, place: str, from_arrow: bool
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The messages of prompt and completion, and which of them are trained on."""
    answer, trained = check_messages(completion, place, "completion", from_arrow)
    if answer[-1]["role"] != "assistant":
        raise ValueError(f"{place}: completion must end in an assistant turn, ends in {answer[-1]['role']!r}")
    responses = tuple(
        len(prompt) + i
        for i, message in enumerate(answer)
        if message["role"] == "assistant" and trained[i] is not False
    )
    if not responses:
        raise ValueError(f"{place}: every assistant turn of `completion` has weight 0: nothing is left to train on")
    messages = prompt + answer
    return messages[: responses[-1] + 1], responses


def choose_responses(
    messages: list[dict[str, Any]], trained: dict[int, bool | None], place: str
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The messages up to the last one that is trained on, and the numbers of those that are.

    Messages that do not end in an assistant turn are a prompt alone, unless a turn is marked for training by name.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    responses = tuple(i for i in turns if trained[i] is not False)
    if messages[-1]["role"] != "assistant" and not any(trained.values()):
        return messages, ()
    if not responses:
        raise ValueError(
            f"{place}: every assistant turn has weight 0, and the last message is one of them: give one weight 1, or "
            "end with the user's turn for a prompt alone"
        )
    return messages[: responses[-1] + 1], responses


def check_ends(messages: list[dict[str, Any]], place: str, column: str) -> None:
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{place}: `{column}` starts with an assistant turn, which nothing asks for")
    if messages[-1]["role"] == "system":
        raise ValueError(f"{place}: `{column}` has no user turn after the last system message, so nothing to answer")


def read_tools(tools: Any, place: str, from_arrow: bool) -> list[dict[str, Any]] | None:
    """The tools that the template describes: a list of dicts, or JSON text of it or of each; None without any."""
    tools = read_json(tools, f"{place}: tools")
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"{place}: `tools` must be a list of dicts or its JSON text, is {tools!r:.80}")
    read = [read_json(tool, f"{place}: tools {number}") for number, tool in enumerate(tools, start=1)]
    for number, tool in enumerate(read, start=1):
        if not isinstance(tool, Mapping):
            raise ValueError(f"{place}: tools {number} must be a dict, is {tool!r:.80}")
    return [without_nulls(tool) if from_arrow else dict(tool) for tool in read]


def read_template_kwargs(values: Any, place: str, from_arrow: bool) -> dict[str, Any]:
    """The row's own variables of the chat template."""
    values = read_json(values, f"{place}: chat_template_kwargs")
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{place}: `chat_template_kwargs` must be a dict or its JSON text, is {values!r:.80}")
    taken = sorted(RESERVED_TEMPLATE_KWARGS & set(values))
    if taken:
        raise ValueError(f"{place}: chat_template_kwargs has `{taken[0]}`, which the engine sets itself")
    return without_nulls(values) if from_arrow else dict(values)

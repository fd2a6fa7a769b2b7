"""Temporary: the interface of engine/chat.py that is to come, on top of today's functions. Deleted at the merge."""

from __future__ import annotations

import copy
import datetime
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template

from engine import chat


class Encoded(NamedTuple):
    prompt_ids: list[int]
    input_ids: list[int]
    response_mask: list[bool]


@dataclass(frozen=True)
class TemplateInput:
    tools: list[dict] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    now: datetime.datetime | None = None


def uses_date(tokenizer: Any) -> bool:
    return "strftime_now" in tokenizer.get_chat_template()


def _with_input(tokenizer: Any, template: TemplateInput) -> Any:
    if template == TemplateInput():
        return tokenizer
    wrapped = copy.copy(tokenizer)
    extra = dict(template.kwargs)
    if template.now is not None:
        # transformers turns callables among the variables into text; globals of the compiled template it leaves alone
        _compile_jinja_template(tokenizer.get_chat_template()).globals["strftime_now"] = template.now.strftime
    wrapped.apply_chat_template = lambda messages, **kw: tokenizer.apply_chat_template(
        messages, tools=template.tools, **extra, **kw
    )
    return wrapped


def _encode(tokenizer: Any, messages: list, responses: list[int]) -> Encoded:
    if not responses or responses[-1] != len(messages) - 1:
        ids = chat.encode_prompt(tokenizer, messages)
        return Encoded(ids, list(ids), [False] * len(ids))
    if chat.GENERATION_TAG.search(tokenizer.get_chat_template()):
        text, spans = chat.render_tagged(tokenizer, messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = [s for s, t in zip(spans, turns, strict=True) if t in responses]
    else:
        text = chat.render(tokenizer, messages)
        spans = [chat.locate_turn(tokenizer, text, messages, turn) for turn in responses]
    ids, mask = chat.mark_tokens(tokenizer, text, spans)
    return Encoded(chat.encode_prompt(tokenizer, messages[: responses[-1]]), ids, mask)


def encode_conversation(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    responses: Collection[int] | None = None,
    *,
    max_length: int | None = None,
    template: TemplateInput = TemplateInput(),
    notes: Counter[str] | None = None,
) -> Encoded | None:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (responses is None or i in responses)]
    tokenizer = _with_input(tokenizer, template)
    try:
        for size in range(len(turns), -1, -1) if turns else [0]:
            if turns and not size:
                return None
            part = messages[: turns[size - 1] + 1] if turns and turns[-1] == len(messages) - 1 else messages
            found = _cut(_encode(tokenizer, part, turns[:size]), max_length)
            if found is not None or not turns:
                return found
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return None


def _cut(encoded: Encoded, max_length: int | None) -> Encoded | None:
    prompt_ids, input_ids, mask = encoded
    if max_length is None:
        return encoded
    if len(prompt_ids) >= max_length or (any(mask) and not any(mask[:max_length])):
        return None
    return Encoded(prompt_ids, input_ids[:max_length], mask[:max_length])


def encode_prompt_completion(
    tokenizer: Any, prompt: str, completion: str | None, *, max_length: int | None = None
) -> Encoded | None:
    return _cut(Encoded(*chat.encode_prompt_completion(tokenizer, prompt, completion)), max_length)

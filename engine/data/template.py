"""Chat templates: rendering a conversation so that each of its texts can be found again.

A conversation is rendered a second time with marks around every text (`engine.data.marks`). What ends a turn, and in
which form a template takes texts and tool calls, is read off probe conversations, once per template.

Knows tokenizers and messages; nothing of rows, ids or masks. No collectives.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from engine.data.marks import Marks, Message, Rendering

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class TemplateInput:
    """What goes into a chat template beside the messages.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call.
        kwargs: variables of the template, such as `enable_thinking`.
        now: what `strftime_now` writes; None is the wall clock.
    """

    tools: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime.datetime | None = None


NO_INPUT = TemplateInput()


@dataclass(frozen=True)
class Shape:
    """What a template does, as probe conversations show it.

    Attributes:
        takes_parts: message contents must be lists of parts; it leaves texts out otherwise.
        takes_argument_text: the arguments of a tool call must be JSON text, not a dict.
        header: the generation prompt.
        writes_calls: it writes tool calls, names and arguments.
        text_ends: what may stand behind the last word of an assistant's turn, through its last control token.
        call_ends: the special token that ends a turn with tool calls.
        stops: the control tokens at which an assistant that has the floor gives it up.
    """

    takes_parts: bool = False
    takes_argument_text: bool = False
    header: str = ""
    writes_calls: bool = False
    text_ends: tuple[str, ...] = ()
    call_ends: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


class ChatTemplate:
    """A tokenizer's chat template with its other input; `shape` is learned at its first use and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: TemplateInput = NO_INPUT) -> None:
        self.tokenizer, self.given = tokenizer, given
        self.source: str = tokenizer.get_chat_template(tools=given.tools)
        self.has_tags = bool(GENERATION_TAG.search(self.source))

    @functools.cached_property
    def shape(self) -> Shape:
        used = {key: value for key, value in self.given.kwargs.items() if is_switch(value)}
        used = {key: used[key] for key in sorted(used.keys() & variables_of(self.source))}
        return learn_shape(self.tokenizer, self.source, json.dumps(used))

    def render(self, messages: list[Message], prompt: bool = False) -> Rendering:
        """The conversation as the template writes it; with `prompt`, and the generation prompt behind it.

        Raises:
            ValueError: where the template refuses the conversation; with the template's words.
        """
        return self.render_as(self.shape, messages, prompt)

    def render_as(self, shape: Shape, messages: list[Message], prompt: bool = False) -> Rendering:
        """As `render`, with messages in the form that `shape` says the template takes."""
        given = self.given
        try:
            with frozen_date(self.source, given.now):
                texts, tagged = chat_template_utils.render_jinja_template(
                    conversations=[[in_form(message, shape) for message in messages]],
                    tools=given.tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=self.has_tags,
                    add_generation_prompt=prompt,
                    **(self.tokenizer.special_tokens_map | dict(given.kwargs)),
                )
        except Exception as error:  # a template is a program that somebody wrote: it fails in ways of its own
            raise ValueError(f"the chat template refuses this conversation: {reason_of(error)}") from error
        return Rendering(texts[0], tuple(tagged[0]) if self.has_tags else None)

    def render_marked(
        self,
        messages: list[Message],
        prompt: bool = False,
        is_marked: Callable[[Message], bool] = lambda message: True,
        shape: Shape | None = None,
    ) -> Rendering:
        """As `render`, and where it put the texts of the messages that `is_marked` says."""
        marks = Marks(messages, [self.given.tools, self.given.kwargs])
        marked = [marks.put(number, m) if is_marked(m) else m for number, m in enumerate(messages)]
        return marks.take_out(self.render_as(shape or self.shape, marked, prompt))


def is_switch(value: Any) -> bool:
    """Whether a template's variable may change its shape: `enable_thinking`, `reasoning_effort`. A text of several
    words is something that it writes."""
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value.split()) == 1)


@functools.lru_cache(maxsize=32)
def variables_of(source: str) -> frozenset[str]:
    """The variables that a chat template reads.

    Raises:
        ValueError: for a template with a mistake in it.
    """
    plain = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{%\1 set _ = 0 \2%}", source)
    try:
        return frozenset(find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)))
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a mistake in line {error.lineno}: {error.message}") from error


@contextmanager
def frozen_date(source: str, now: datetime.datetime | None) -> Iterator[None]:
    """Within, `strftime_now` of the template `source` writes `now`."""
    if now is None or "strftime_now" not in source:
        yield
        return
    # transformers 5.23 turns every argument of a template into plain data, functions too, so the clock can only be
    # set where its own is: among the globals of the compiled template, which it caches by source.
    names = chat_template_utils._compile_jinja_template(source).environment.globals
    theirs = names["strftime_now"]
    names["strftime_now"] = now.strftime
    try:
        yield
    finally:
        names["strftime_now"] = theirs


def reason_of(error: Exception) -> str:
    """The template's own words, or what kind of failure it was."""
    return str(error) if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {error}"


def in_form(message: Message, shape: Shape) -> Message:
    """The message as a template of this shape takes it."""
    calls = message.get("tool_calls")
    if shape.takes_parts and isinstance(message.get("content"), str):
        message = message | {"content": [{"type": "text", "text": message["content"]}]}
    if calls and shape.takes_argument_text:
        message = message | {"tool_calls": [with_argument_text(call) for call in calls]}
    return message


def with_argument_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer: PreTrainedTokenizerBase, special_only: bool = False) -> re.Pattern[str]:
    """Matches the tokens that the tokenizer keeps whole, or the special ones among them; white space (Gemma has such
    tokens) left out."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or not special_only} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL_NAME, CALL_VALUE, CALL_NUMBER = "probe_function", "probe value", 904711
CALL_ARGUMENTS = {"count": CALL_NUMBER, "probe": CALL_VALUE}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00000", "function": {"name": CALL_NAME, "arguments": CALL_ARGUMENTS}}
    ],
}
RESULT = {"role": "tool", "name": CALL_NAME, "tool_call_id": "call00000", "content": "Fine"}


@functools.lru_cache(maxsize=256)
def learn_shape(tokenizer: PreTrainedTokenizerBase, source: str, kwargs: str) -> Shape:
    """The shape of the chat template `source` with the variables `kwargs` (JSON)."""
    chat = ChatTemplate(tokenizer, TemplateInput(kwargs=json.loads(kwargs)))
    chat.source, chat.has_tags = source, bool(GENERATION_TAG.search(source))
    for takes_parts in (False, True):
        shape = Shape(takes_parts)
        talk = probe(chat, [USER, ANSWER, USER, ANSWER], shape)
        if talk is not None and {1, 3} <= talk.by_message.keys():
            break
    else:
        return Shape()  # the row itself will say what is wrong
    text_ends = ends_of_text(chat, talk)
    text_stops = [control_tokens(tokenizer).findall(end)[-1] for end in text_ends[-1:]]
    call_ends: tuple[str, ...] = ()
    for takes_text in (False, True):
        writes_calls, call_ends = ends_of_call(chat, Shape(takes_parts, takes_text))
        if writes_calls:
            break
    header = generation_prompt(chat, Shape(takes_parts))
    stops = tuple(dict.fromkeys([*text_stops, *call_ends]))
    return Shape(takes_parts, writes_calls and takes_text, header, writes_calls, text_ends, call_ends, stops)


def probe(chat: ChatTemplate, messages: list[Message], shape: Shape) -> Rendering | None:
    """The marked rendering of a probe conversation; None where the template refuses it."""
    try:
        return chat.render_marked(messages, shape=shape)
    except ValueError:
        return None


def ends_of_text(chat: ChatTemplate, talk: Rendering) -> tuple[str, ...]:
    """What may stand behind an answer: first, in the middle of the exchange `talk`; last, at its end."""
    pattern = control_tokens(chat.tokenizer)
    next_start = min(start for (start, _), piece in talk.by_message.get(2, talk.by_message[3]))
    middle, last = talk.text[talk.end_of(1) : next_start], talk.text[talk.end_of(3) :]
    alike = os.path.commonprefix([middle, last])
    tokens = [match.end() for match in pattern.finditer(alike)]
    if tokens:
        return (alike[: tokens[-1]],)
    first = [pattern.search(tail) for tail in (middle, last)]
    if first[1] is None:
        return ()
    return tuple(tail[: match.end()] for tail, match in zip((middle, last), first, strict=True) if match)


def ends_of_call(chat: ChatTemplate, shape: Shape) -> tuple[bool, tuple[str, ...]]:
    """Whether the template writes tool calls, and the special token that ends a turn with one, result or no result."""
    alone, answered = probe(chat, [USER, CALL], shape), probe(chat, [USER, CALL, RESULT], shape)
    if alone is None or not all(text in alone.text for text in (CALL_NAME, CALL_VALUE, str(CALL_NUMBER))):
        return False, ()
    tails = [r.text[r.text.rfind(CALL_VALUE) + len(CALL_VALUE) :] for r in (alone, answered) if r is not None]
    tokens = control_tokens(chat.tokenizer, special_only=True).findall(os.path.commonprefix(tails))
    return True, tuple(tokens[-1:])


def generation_prompt(chat: ChatTemplate, shape: Shape) -> str:
    """What `add_generation_prompt` adds behind a user's message."""
    without, prompt = chat.render_as(shape, [USER]).text, chat.render_as(shape, [USER], prompt=True).text
    return prompt[len(os.path.commonprefix([without, prompt])) :]

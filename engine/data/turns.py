"""Where the assistant's turns stand in a rendered conversation, and whether all that it says is there.

A turn is what the assistant writes once it has the floor: reasoning, text and tool calls, through the token with which
it ends. The header before it is what the generation prompt writes there.

Knows templates and messages; nothing of ids. No collectives.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine.data.completeness import require_all_texts, require_calls, room_of
from engine.data.marks import Message, Rendering, Span
from engine.data.template import ChatTemplate, control_tokens

logger = logging.getLogger(__name__)

# What a generation prompt may open, or open and close, before the model writes: Qwen's and DeepSeek's block, Gemma 4's.
THINK_PREFIX = re.compile(r"(<think>\s*(</think>\s*)?|<\|channel>thought\s*(<channel\|>\s*)?)$")
THINK_OPEN = re.compile(r"(<think>|<\|channel>thought)\s*$")
EMPTY_THINK = re.compile(r"\s*(<think>)?\s*</think>\s*|\s*<\|channel>thought\s*<channel\|>\s*")


@dataclass(frozen=True)
class Located:
    """A conversation's text, the characters of it that the assistant writes, and the prompt of its last turn."""

    text: str
    spans: list[Span]
    prompt: str


def locate(
    chat: ChatTemplate, messages: list[Message], turns: list[int], plain: Rendering | None, notes: Counter[str]
) -> Located:
    """Find the turns of the messages with the numbers `turns`, the last of which is the conversation's last.

    Args:
        plain: the conversation as the template writes it, where it is there already.
        notes: as `encode_conversation`.

    Raises:
        ValueError: where the template leaves out what the assistant says, or does not show where a turn is.
    """
    last = len(messages) - 1
    whole, is_marked = render_with_places(chat, messages, plain or chat.render(messages))
    prompt = chat.render_marked(messages[:last], prompt=True, is_marked=is_marked)
    whole, start = start_with_prompt(chat, messages, whole, prompt)
    if not whole.text.startswith(prompt.text):
        notes["the generation prompt opens a think block that a row's last turn does not have"] += 1
    require_all_texts(chat, messages, whole, notes)
    headers = Headers(chat, messages, prompt, is_marked)
    spans: list[Span] = []
    for turn in turns:
        own = turn_span(chat, messages, whole, turn, start if turn == last else None, headers)
        spans += own if whole.tagged is None else tagged_parts(own, whole.tagged)
    if not spans:
        raise ValueError("the chat template has {% generation %} but marks nothing in a conversation with an answer")
    return Located(whole.text, spans, prompt.text)


def render_with_places(chat: ChatTemplate, messages: list[Message], plain: Rendering):
    """The rendering `plain` with the places of all texts, or of the assistant's where marks in others change it; and
    which messages were marked."""

    def everything(message: Message) -> bool:
        return True

    def assistant_only(message: Message) -> bool:
        return message["role"] == "assistant"

    for is_marked in (everything, assistant_only):
        whole = chat.render_marked(messages, is_marked=is_marked)
        if whole.text == plain.text:
            return whole, is_marked
    raise not_located(None, "it writes a text differently by what the text says")


def start_with_prompt(
    chat: ChatTemplate, messages: list[Message], whole: Rendering, prompt: Rendering
) -> tuple[Rendering, int]:
    """A rendering that begins with the prompt of the last turn, and where that turn starts in it.

    Most templates write it so. One that treats the last messages differently (a system text that moves to the last
    user turn, reasoning that goes once an answer follows) gives another beginning: then the prompt, which is what the
    model will see, with the last turn behind it.

    Raises:
        ValueError: where the last turn does not show what precedes it.
    """
    bare = THINK_PREFIX.sub("", prompt.text)
    for beginning in (prompt.text, bare):
        if whole.text.startswith(beginning):
            return whole, len(beginning)
    last = len(messages) - 1
    prompt_end, whole_end = prompt.end_of(last - 1), whole.end_of(last - 1)
    if prompt_end is not None and whole_end is not None and chat.render(messages[:last], True).text == prompt.text:
        for beginning in (prompt.text, bare):
            header = beginning[prompt_end:]
            if whole.text.startswith(header, whole_end):
                cut = whole_end + len(header)
                return joined(prompt, beginning, whole, cut, last), len(beginning)
    raise not_located(last, "the prompt of a rollout is not how the conversation begins")


def joined(prompt: Rendering, beginning: str, whole: Rendering, cut: int, last: int) -> Rendering:
    """`beginning`, which is of `prompt`, and what `whole` has from `cut` on: its last turn."""
    by = len(beginning) - cut
    own = {piece: (start + by, end + by) for piece, (start, end) in whole.spans.items() if piece.message == last}
    tagged = None
    if whole.tagged is not None:
        tagged = (prompt.tagged or ()) + tuple((max(a, cut) + by, b + by) for a, b in whole.tagged if b > cut)
    return Rendering(beginning + whole.text[cut:], tagged, whole.marked, prompt.spans | own)


class Headers:
    """What stands between the text of a message and the assistant's next word, by the role of that message.

    Known from the prompt of the last turn, and for messages of other roles from the first prompt behind one.
    """

    LIMIT = 2  # renderings for roles other than that before the last turn

    def __init__(self, chat: ChatTemplate, messages: list[Message], prompt: Rendering, is_marked) -> None:
        self._chat, self._messages, self._is_marked = chat, messages, is_marked
        self._known: dict[str, str | None] = {}
        self._learn(len(messages) - 1, prompt)

    def _learn(self, turn: int, prompt: Rendering) -> None:
        end = prompt.end_of(turn - 1)
        if end is not None or self._messages[turn - 1]["role"] not in self._known:
            self._known[self._messages[turn - 1]["role"]] = None if end is None else prompt.text[end:]

    def before(self, turn: int) -> str | None:
        """The header of a turn; None where it is not known."""
        role = self._messages[turn - 1]["role"]
        if role not in self._known and len(self._known) <= self.LIMIT:
            prompt = self._chat.render_marked(self._messages[:turn], prompt=True, is_marked=self._is_marked)
            self._learn(turn, prompt)
        return self._known.get(role)


def turn_span(
    chat: ChatTemplate, messages: list[Message], whole: Rendering, turn: int, start: int | None, headers: Headers
) -> list[Span]:
    """Characters that the assistant writes in message number `turn`, through the token that ends it.

    Args:
        start: where the turn starts behind its header, where that is known.

    Raises:
        ValueError: where the rendering does not show them.
    """
    room_start, room_end = room_of(messages, whole, turn)
    own = [span for span, _ in whole.by_message.get(turn, [])]
    if own and own[-1][1] > room_end:
        raise not_located(turn, "its text stands behind that of the next message")
    if start is None and turn:
        start = header_end(whole.text, room_start, headers.before(turn))
    start = start_of_turn(chat, messages, whole, turn, start)
    said_end, has_calls = own[-1][1] if own else start, bool(messages[turn].get("tool_calls"))
    if has_calls:
        said_end = max(said_end, require_calls(chat, messages, whole, turn))
    end = end_of_turn(chat, whole.text, said_end, room_end, has_calls)
    return without_headers(chat, whole, (start, end), own)


def start_of_turn(chat: ChatTemplate, messages: list[Message], whole: Rendering, turn: int, header: int | None) -> int:
    """Where a turn starts whose header ends at `header`, where that is known.

    Between header and words stand white space, which is the turn's, the tag that opens the reasoning, a tool call, or
    something of the template's: an empty think block, a channel's name.
    """
    text, own = whole.text, whole.by_message.get(turn, [])
    if not own and header is None:
        raise not_located(turn, "the generation prompt does not stand before it")
    first = own[0][0][0] if own else len(text)
    if header is None or header > first:
        return first
    empty = EMPTY_THINK.match(text, header, first)
    start = empty.end() if empty else header
    between = text[start:first]
    if not own or any(call["function"]["name"] in between for call in messages[turn].get("tool_calls") or []):
        return start
    opened = THINK_OPEN.search(between)
    if not chat.shape.header and between[: opened.start() if opened else None].strip():
        raise ValueError(
            f"the chat template writes {between!r} before an answer but ignores add_generation_prompt, so a rollout "
            "could not begin: add `{% if add_generation_prompt %}` to the template"
        )
    if own[0][1].is_reasoning:
        return start + opened.start() if opened else first
    return first if between.strip() else start


def without_headers(chat: ChatTemplate, whole: Rendering, span: Span, own: list[Span]) -> list[Span]:
    """A turn that the template cuts into several messages (a channel for the reasoning, each call its own), without
    the headers of the later ones: through the text that follows, or where that is a call, the header alone."""
    header = THINK_PREFIX.sub("", chat.shape.header).strip()
    spans, start, end = [], *span
    while header and (place := whole.text.find(header, start, end)) >= 0:
        if any(a <= place < b for a, b in own):  # the assistant's own words
            break
        spans.append((start, place))
        start = min((a for a, _ in own if a > place), default=place + len(header))
    return [*spans, (start, end)]


def header_end(text: str, start: int, header: str | None) -> int | None:
    """Where a header that stands at `start` ends; None where it does not stand there."""
    if header is None:
        return None
    for form in (header, THINK_PREFIX.sub("", header)):
        if text.startswith(form, start):
            return start + len(form)
    return None


def end_of_turn(chat: ChatTemplate, text: str, said_end: int, room_end: int, has_calls: bool) -> int:
    """Where a turn ends whose last text or call ends at `said_end`; no further than `room_end`."""
    shape = chat.shape
    if not shape.text_ends:
        warn_of_endless_turns(chat.tokenizer)
    if not has_calls:
        found = (re.compile(r"\s*" + re.escape(end)).match(text, said_end, room_end) for end in shape.text_ends)
        return next((match.end() for match in found if match), said_end)
    ends = [place + len(end) for end in shape.call_ends if (place := text.find(end, said_end, room_end)) >= 0]
    if ends:
        return min(ends)
    next_header = control_tokens(chat.tokenizer, special_only=True).search(text, said_end, room_end)
    return said_end + len(text[said_end : next_header.start() if next_header else room_end].rstrip())


def tagged_parts(spans: list[Span], tagged: tuple[Span, ...]) -> list[Span]:
    """What `{% generation %}` leaves of a turn: the parts inside it, the last one through the end of the turn."""
    parts: list[Span] = []
    for part in sorted((max(a, start), min(b, end)) for a, b in spans for start, end in tagged):
        if part[0] < part[1]:
            joins = parts and parts[-1][1] == part[0]
            parts[-1:] = [(parts[-1][0], part[1])] if joins else [*parts[-1:], part]
    return parts[:-1] + [(parts[-1][0], spans[-1][1])] if parts else []


@functools.lru_cache(maxsize=8)  # once per tokenizer
def warn_of_endless_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    logger.warning(
        "the chat template of %r writes no special token behind an assistant turn: the student cannot learn to stop, "
        "and a rollout ends only after max_new_tokens",
        tokenizer.name_or_path,
    )


def not_located(turn: int | None, reason: str) -> ValueError:
    where = "the assistant wrote" if turn is None else f"the assistant wrote in message {turn + 1}"
    return ValueError(
        f"the chat template does not show what {where}: {reason}. Change the template, or tokenise the rows yourself"
    )

"""Marks around the texts of a conversation: put in before a template renders it, taken out of the rendering.

A template may trim, reorder, rewrite or leave out what messages say, and does not say where it put it. A private-use
character on either side of a text does: where both come out once, the text stands between them.

Knows messages as dicts and text; nothing of templates or tokenizers.
"""

from __future__ import annotations

import bisect
import copy
import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, Any]
Span = tuple[int, int]

THINK_TAG = re.compile(r"(</?think>)")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # in the order in which transformers prefers them
PRIVATE_USE = range(0xF0000, 0x110000)  # planes 15 and 16


class Piece(NamedTuple):
    """A text of a conversation: the number of its message, its own within that, and whether it is reasoning."""

    message: int
    part: int
    is_reasoning: bool


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        tagged: what `{% generation %}` encloses; None for a template without it.
        marked: the texts that were marked.
        spans: where they stand, as characters of `text`; one that the template leaves out, or writes twice, is missing.
        repeated: those that it writes more than once.
    """

    text: str
    tagged: tuple[Span, ...] | None = None
    marked: tuple[Piece, ...] = ()
    spans: dict[Piece, Span] = field(default_factory=dict)
    repeated: tuple[Piece, ...] = ()

    @functools.cached_property
    def by_message(self) -> dict[int, list[tuple[Span, Piece]]]:
        """The texts of each message with their places, in the order of the rendering."""
        found: dict[int, list[tuple[Span, Piece]]] = {}
        for piece, span in sorted(self.spans.items(), key=lambda item: item[1]):
            found.setdefault(piece.message, []).append((span, piece))
        return found

    def end_of(self, message: int) -> int | None:
        """Where the last text of a message ends; None where it has none."""
        places = self.by_message.get(message)
        return places[-1][0][1] if places else None


class Marks:
    """Private-use characters around texts: put in before a conversation is rendered, taken out of the rendering."""

    def __init__(self, messages: list[Message], others: Any = None) -> None:
        """`others` is what else the rendering may hold."""
        text = json.dumps([messages, others], ensure_ascii=False, default=str)
        # of each message its reasoning and its content, which think tags cut into parts; two marks around each
        self._first = free_private_use(text, 2 * (3 * len(messages) + text.count("think>")))
        self._pieces: list[Piece] = []

    def put(self, number: int, message: Message) -> Message:
        """Message `number` with marks around its reasoning and its text, white space at their edges left outside."""
        marked = copy.copy(message)
        reasoning = next((name for name in REASONING_FIELDS if isinstance(message.get(name), str)), None)
        if reasoning is not None:
            marked[reasoning] = self._around(message[reasoning], number, True)
        content = message.get("content")
        if isinstance(content, str):
            is_reasoning, parts = False, []
            for part in THINK_TAG.split(content) if message.get("role") == "assistant" else [content]:
                if THINK_TAG.fullmatch(part):
                    is_reasoning = part == "<think>"
                    parts.append(part)
                else:
                    parts.append(self._around(part, number, is_reasoning))
            marked["content"] = "".join(parts)
        return marked

    def _around(self, text: str, number: int, is_reasoning: bool) -> str:
        core = text.strip()
        if not core:
            return text
        mark = self._first + 2 * len(self._pieces)
        self._pieces.append(Piece(number, len(self._pieces), is_reasoning))
        before = text[: len(text) - len(text.lstrip())]
        return before + chr(mark) + core + chr(mark + 1) + text[len(before) + len(core) :]

    def take_out(self, rendering: Rendering) -> Rendering:
        """The rendering without the marks, and the spans that they enclosed."""
        if not self._pieces:
            return rendering
        taken: list[str] = []
        places: list[int] = []
        edges: dict[int, list[int]] = {}
        start = 0
        last = self._first + 2 * len(self._pieces) - 1
        for match in re.finditer(f"[{chr(self._first)}-{chr(last)}]", rendering.text):
            taken.append(rendering.text[start : match.start()])
            edges.setdefault(ord(match.group()) - self._first, []).append(match.start() - len(places))
            places.append(match.start())
            start = match.end()
        spans, repeated = {}, []
        for index, piece in enumerate(self._pieces):
            opened, closed = edges.get(2 * index, []), edges.get(2 * index + 1, [])
            if len(opened) == len(closed) == 1:
                spans[piece] = (opened[0], closed[0])
            elif opened and closed:
                repeated.append(piece)
        tagged = rendering.tagged
        if tagged is not None:
            tagged = tuple((a - bisect.bisect_left(places, a), b - bisect.bisect_left(places, b)) for a, b in tagged)
        text = "".join(taken) + rendering.text[start:]
        return Rendering(text, tagged, tuple(self._pieces), spans, tuple(repeated))


def free_private_use(text: str, count: int) -> int:
    """The first of `count` private-use characters in a row that `text` does not have.

    Raises:
        ValueError: where it has too many of them.
    """
    taken = sorted({ord(char) for char in set(text) if ord(char) >= PRIVATE_USE.start})
    for before, after in zip([PRIVATE_USE.start - 1, *taken], [*taken, PRIVATE_USE.stop], strict=True):
        if after - before > count:
            return before + 1
    raise ValueError("the text has so many private-use characters that none are left to mark its parts with")

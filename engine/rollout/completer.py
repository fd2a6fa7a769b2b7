"""What writes completions: requests in, completions out.

A backend is a `Completer`: a class in a file of its own and a line in `placement`. It may know the writer's model and
how tokens are drawn; it knows nothing of samples, steps, or how prompts are dealt to ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass(frozen=True)
class Request:
    """A prompt, and one seed for each completion wanted of it; they share the prefill.

    `max_new_tokens` lowers the sampling's own limit for this prompt.
    """

    prompt_ids: list[int]
    seeds: list[int]
    max_new_tokens: int | None = None


@dataclass
class Completion:
    """Tokens of one completion. `stopped`: it ends in a stop id rather than at the length limit."""

    token_ids: list[int]
    stopped: bool = False


class Writer(Protocol):
    """Who writes: the student, or the teacher."""

    model: nn.Module

    def gathered(self) -> AbstractContextManager[object]:
        """While the block lasts, `model` is whole on this rank. All ranks must call."""


class Completer(Protocol):
    """Writes completions with one writer's model. All ranks must call its methods, in the same order."""

    def ready(self) -> AbstractContextManager[object]:
        """While the block lasts, the writer's weights as they are now are where completions are written.

        The time that it takes to enter is the metric `rollout/gather_s`.
        """

    def complete(self, requests: list[Request]) -> list[list[Completion]]:
        """Completions of this rank's requests (none, on some ranks), in the order of their seeds. Within `ready`.

        A completion's tokens depend on the prompt and its seed, not on the requests beside it or on the rank. A prompt
        that leaves no room for a token gets empty completions.
        """

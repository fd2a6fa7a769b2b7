"""A completion in the making: its prompt, its tokens so far, and the uniforms that will draw the next ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.rollout.completer import Completion


class Status(Enum):
    WAITING = auto()  # no token yet: its prompt has not passed through the model
    LIVE = auto()  # every further token takes a step
    FINISHED = auto()


@dataclass
class Sequence:
    """One prompt and one completion of it.

    Attributes:
        max_new_tokens: longest completion that there is room for; none where this is not positive.
        uniforms: one for each token that may be drawn; empty for greedy decoding.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    uniforms: list[float]
    completion: Completion = field(default_factory=lambda: Completion([]))

    @property
    def status(self) -> Status:
        if self.completion.stopped or self.num_new_tokens >= self.max_new_tokens:
            return Status.FINISHED
        return Status.LIVE if self.completion.token_ids else Status.WAITING

    @property
    def num_new_tokens(self) -> int:
        return len(self.completion.token_ids)

    @property
    def num_cached(self) -> int:
        """Columns of the KV cache that it fills: the last drawn token has not passed through the model."""
        return len(self.prompt_ids) + self.num_new_tokens - 1

    @property
    def next_uniform(self) -> float:
        return self.uniforms[self.num_new_tokens]

    def append(self, token_id: int, is_stop: bool) -> None:
        self.completion.token_ids.append(token_id)
        self.completion.stopped = is_stop

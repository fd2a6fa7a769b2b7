"""Which prompts enter the decoder when. Knows lengths and counts; no tensors.

Prompts of like length go together, the longest first. A prefill costs a forward pass however few sequences it brings,
so it waits until an eighth of the slots is free.
"""

from __future__ import annotations

from engine.rollout.completer import Completion, Request
from engine.rollout.sampling import Sampling, uniform_draws
from engine.rollout.sequence import Sequence, Status


class Schedule:
    """The sequences of one run of decoding that wait, in groups that share a prompt and its prefill.

    Attributes:
        completions: those of each request, in the order of its seeds; decoding fills them.
    """

    def __init__(self, requests: list[Request], sampling: Sampling, num_slots: int, prefill_tokens: int) -> None:
        self.num_slots, self.prefill_tokens = num_slots, prefill_tokens
        self.completions: list[list[Completion]] = []
        self._waiting: list[list[Sequence]] = []
        for request in requests:
            sequences = admit(request, sampling)
            self.completions.append([s.completion for s in sequences])
            waiting = [s for s in sequences if s.status is Status.WAITING]
            self._waiting += [waiting[i : i + num_slots] for i in range(0, len(waiting), num_slots)]
        self._waiting.sort(key=lambda group: -len(group[0].prompt_ids))

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def next_prefill(self, num_live: int) -> list[list[Sequence]]:
        """The groups to prefill now, beside `num_live` sequences; none where those should go on by a token first."""
        free = self.num_slots - num_live
        wanted = min(sum(map(len, self._waiting)), max(1, self.num_slots // 8))
        if not self._waiting or (num_live and free < wanted):
            return []
        batch: list[list[Sequence]] = []
        width = len(self._waiting[0][0].prompt_ids)
        while self._waiting and len(self._waiting[0]) <= free:
            if batch and (len(batch) + 1) * width > self.prefill_tokens:
                break
            batch.append(self._waiting.pop(0))
            free -= len(batch[-1])
        return batch


def admit(request: Request, sampling: Sampling) -> list[Sequence]:
    """A sequence for each seed of a request."""
    longest = min(request.max_new_tokens or sampling.max_new_tokens, sampling.max_new_tokens)
    room = min(longest, sampling.context_size - len(request.prompt_ids))
    num_draws = 0 if sampling.greedy else max(0, room)
    return [Sequence(request.prompt_ids, room, uniform_draws(seed, num_draws)) for seed in request.seeds]

"""Rollouts: completions for all micro-batches of an optimizer step, by the student or, for `seq_kd`, the teacher.

Prompts are dealt over the ranks so that the longest do not fall to one; each rank's completer writes its share, and
each rank then gets its own samples back. A sample's tokens depend on (seed, step, sample index), not on the rank that
decodes it. How a completer writes is not known here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from engine.cluster.collectives import all_gather_lists, draw_seed
from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.data.order import copy_indices
from engine.rollout.completer import Completer, Request, Writer
from engine.rollout.placement import build_completer
from engine.rollout.sampling import Sampling


@dataclass(frozen=True)
class Completions:
    """All ranks' completions, by sample index, and how they came about."""

    token_ids: dict[int, list[int]]
    stopped: dict[int, bool]
    metrics: dict[str, float]


class Rollout:
    """Generates for a run. All ranks must call its methods, in the same order."""

    def __init__(self, config: GKDConfig, sampling: Sampling, rank: int, world_size: int, device: torch.device) -> None:
        self.config, self.sampling = config, sampling
        self.rank, self.world_size, self.device = rank, world_size, device
        self._completers: dict[int, Completer] = {}  # by the id of its writer, which lives as long as the run

    def generate(
        self, batches: list[list[Sample]], step: int, writer: Writer
    ) -> tuple[list[list[Sample]], dict[str, float]]:
        """Replace each sample's response by `num_generations` fresh ones; also the `rollout/` metrics."""
        copies = self.config.num_generations
        completions = self.complete([s for batch in batches for s in batch], copies, ("rollout", step), writer)
        written = [
            [s.with_response(completions.token_ids[i], i) for s in batch for i in copy_indices(s.index, copies)]
            for batch in batches
        ]
        return written, completions.metrics

    def complete(
        self, samples: list[Sample], copies: int, purpose: tuple[str | int, ...], writer: Writer
    ) -> Completions:
        """Completions of all ranks' samples. `purpose` goes into the seeds, such as ("rollout", step)."""
        gathered = all_gather_lists([[s.index, *s.prompt_ids] for s in samples], self.device)
        prompts = [prompt for of_rank in gathered for prompt in of_rank]
        share = deal(prompts, self.world_size)[self.rank]
        requests = [
            Request(ids, [draw_seed(self.config.seed, *purpose, i) for i in copy_indices(index, copies)])
            for index, *ids in share
        ]
        started = time.perf_counter()
        completer = self._completer(writer)
        with completer.ready():
            ready_at = time.perf_counter()
            results = completer.complete(requests)
            decoded_at = time.perf_counter()
        written = [
            [i, int(completion.stopped), *completion.token_ids]
            for (index, *_), completions in zip(share, results, strict=True)
            for i, completion in zip(copy_indices(index, copies), completions, strict=True)
        ]
        done_at = time.perf_counter()
        everyone = [one for of_rank in all_gather_lists(written, self.device) for one in of_rank]
        timing = {
            "rollout/gather_s": ready_at - started,
            "rollout/idle_s": time.perf_counter() - done_at,
            "rollout/tokens_per_s": sum(len(one) - 2 for one in written) / max(decoded_at - ready_at, 1e-9),
        }
        clipped = {"rollout/share_clipped": self._share_clipped([len(ids) for _, *ids in prompts])}
        token_ids = {index: ids for index, _, *ids in everyone}
        stopped = {index: bool(flag) for index, flag, *_ in everyone}
        metrics = describe(list(token_ids.values()), list(stopped.values())) | clipped | timing
        return Completions(token_ids, stopped, metrics)

    def _completer(self, writer: Writer) -> Completer:
        """The writer's completer, chosen at its first rollout and kept."""
        if id(writer) not in self._completers:
            self._completers[id(writer)] = build_completer(self.config, writer, self.sampling, self.device)
        return self._completers[id(writer)]

    def _share_clipped(self, prompt_lengths: list[int]) -> float:
        """Share of the prompts that leave less room than `max_new_tokens`."""
        longest_whole = self.sampling.context_size - self.sampling.max_new_tokens
        return sum(length > longest_whole for length in prompt_lengths) / max(1, len(prompt_lengths))


def deal(prompts: list[list[int]], num_hands: int) -> list[list[list[int]]]:
    """Deal prompts, longest first, back and forth over the ranks: like sums of lengths, like counts."""
    hands: list[list[list[int]]] = [[] for _ in range(num_hands)]
    for place, prompt in enumerate(sorted(prompts, key=lambda p: (-len(p), p[0]))):
        turn, seat = divmod(place, num_hands)
        hands[seat if turn % 2 == 0 else num_hands - 1 - seat].append(prompt)
    return hands


def describe(completions: list[list[int]], stopped: list[bool]) -> dict[str, float]:
    """Metrics over all ranks' completions. distinct_2: distinct pairs of neighbouring tokens / all pairs."""
    lengths = [len(c) for c in completions]
    pairs = [pair for c in completions for pair in zip(c, c[1:], strict=False)]
    count = max(1, len(completions))
    return {
        "rollout/tokens": float(sum(lengths)),
        "rollout/mean_length": sum(lengths) / count,
        "rollout/max_length": float(max(lengths, default=0)),
        "rollout/share_stopped": sum(stopped) / count,
        "rollout/share_truncated": sum(not s and bool(c) for s, c in zip(stopped, completions, strict=True)) / count,
        "rollout/distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }

"""Rollouts: completions for all micro-batches of an optimizer step, by the student or, for `seq_kd`, the teacher.

Parameters are gathered once, or fetched layer by layer where the model does not fit; every rank decodes its share of
the prompts, dealt so that the longest do not fall to one rank; each rank then gets its own samples back. A sample's
tokens depend on (seed, step, sample index), not on the rank that decodes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from engine.cluster import hosts
from engine.cluster.collectives import all_gather_lists, draw_seed
from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.rollout.decoder import Decoder, Request, Sampling
from engine.zero import partitions

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Who writes: the student, or the teacher."""

    model: nn.Module

    def gathered(self) -> AbstractContextManager[nn.Module]: ...


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
        self._placements: dict[int, str] = {}

    def generate(
        self, batches: list[list[Sample]], step: int, writer: Writer
    ) -> tuple[list[list[Sample]], dict[str, float]]:
        """Replace each sample's response by `num_generations` fresh ones; also the `rollout/` metrics."""
        copies = self.config.num_generations
        completions = self.complete([s for batch in batches for s in batch], copies, ("rollout", step), writer)
        numbered = [[(s, s.index * copies + copy) for s in batch for copy in range(copies)] for batch in batches]
        written = [[s.with_response(completions.token_ids[index], index) for s, index in batch] for batch in numbered]
        return written, completions.metrics

    def complete(self, samples: list[Sample], copies: int, purpose: tuple, writer: Writer) -> Completions:
        """Completions of all ranks' samples. `purpose` goes into the seeds, such as ("rollout", step)."""
        prompts = all_gather_lists([[s.index, *s.prompt_ids] for s in samples], self.device)
        share = deal([row for rows in prompts for row in rows], self.world_size)[self.rank]
        requests = [
            Request(ids, [draw_seed(self.config.seed, *purpose, index * copies + copy) for copy in range(copies)])
            for index, *ids in share
        ]
        started = time.perf_counter()
        with self._decoder(writer) as decoder:
            gathered_at = time.perf_counter()
            results = decoder.decode(requests)
            decoded_at = time.perf_counter()
        rows = [
            [index * copies + copy, int(completion.stopped), *completion.token_ids]
            for (index, *_), completions in zip(share, results, strict=True)
            for copy, completion in enumerate(completions)
        ]
        done_at = time.perf_counter()
        everyone = [row for rank_rows in all_gather_lists(rows, self.device) for row in rank_rows]
        idle_s = time.perf_counter() - done_at
        local_tokens = sum(len(row) - 2 for row in rows)
        metrics = describe([row[2:] for row in everyone], [bool(row[1]) for row in everyone])
        longest_whole = self.sampling.context_size - self.sampling.max_new_tokens
        lengths = [len(prompt) - 1 for rows in prompts for prompt in rows]  # the first number is the index
        metrics |= {
            "rollout/share_clipped": sum(length > longest_whole for length in lengths) / max(1, len(lengths)),
            "rollout/gather_s": gathered_at - started,
            "rollout/idle_s": idle_s,
            "rollout/tokens_per_s": local_tokens / max(decoded_at - gathered_at, 1e-9),
        }
        return Completions({r[0]: r[2:] for r in everyone}, {r[0]: bool(r[1]) for r in everyone}, metrics)

    @contextmanager
    def _decoder(self, writer: Writer) -> Iterator[Decoder]:
        """A decoder over the whole model, or over its partitions with all ranks in step."""
        if self.placement(writer) == "gathered":
            with writer.gathered() as model:
                yield Decoder(model, self.sampling, self.config.generation_rows, device=self.device)
        else:
            writer.model.eval()
            rows = self.config.generation_rows
            yield Decoder(writer.model, self.sampling, rows, synchroniser=self._any_rank, device=self.device)

    def _any_rank(self, active: bool) -> bool:
        flag = torch.tensor([active], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def placement(self, writer: Writer) -> str:
        """`gathered` or `partitioned` for this writer; decided once, by the rank with the least free memory."""
        key = id(writer)
        if key not in self._placements:
            self._placements[key] = self._decide(writer.model)
        return self._placements[key]

    def _decide(self, model: nn.Module) -> str:
        if not any(map(partitions.is_partitioned, model.parameters())):
            return "gathered"  # it is whole already
        if self.config.generation_placement != "auto":
            return self.config.generation_placement
        needed = 1.1 * (parameter_bytes(model) + cache_bytes(model, self.config))
        free = torch.tensor([free_memory_bytes()], dtype=torch.float64, device=self.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        chosen = "gathered" if needed < free.item() else "partitioned"
        if self.rank == 0:
            logger.info(
                "generation_placement auto: %s; whole model and KV cache need %.2f GiB, the fullest rank has %.2f",
                chosen,
                needed / 2**30,
                free.item() / 2**30,
            )
        return chosen


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


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the whole model in its compute dtype."""
    return sum(partitions.full_shape(p).numel() * p.element_size() for p in model.parameters())


def cache_bytes(model: nn.Module, config: GKDConfig) -> int:
    """Bytes of the KV cache when every row is as long as it can get."""
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_size * next(model.parameters()).element_size()
    return config.generation_rows * (config.max_length + config.max_new_tokens) * per_token


def free_memory_bytes() -> float:
    """Memory that this rank may still take: the accelerator's, or its share of the host's."""
    if get_accelerator().device_name() == "cpu":
        return psutil.virtual_memory().available / hosts.ranks_per_node()
    return get_accelerator().available_memory()

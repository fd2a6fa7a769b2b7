"""A continuous decoder: rows that finish leave the KV cache at once, waiting prompts take their place.

Cost follows the tokens that are generated, not rows times the longest. Only the scheduling is written here; the
cache layers and the logits processors are transformers'. Every sample draws its randomness from a seed of its own, so
its tokens do not depend on which rows, ranks or batches it shares the decoder with (exactly so up to rounding of the
logits; in fp32 the tokens agree).

All live rows end at the same column of the cache; shorter ones are masked on the left.

Shapes: R live rows, L cache columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.rollout.cache import build_cache, pad_left, trim_left


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        stop_ids: ids that end a completion; the id itself belongs to it.
        vocab_size: ids from here on are never drawn (rows that only one of two models has).
        context_size: longest prompt plus completion, in tokens.
        temperature: divides the logits; `greedy` ignores it and the seeds.
    """

    stop_ids: tuple[int, ...]
    vocab_size: int
    context_size: int
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False

    def warpers(self) -> list[LogitsProcessor]:
        """transformers' processors, in its own order."""
        wanted: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            wanted.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.greedy:
            return wanted
        if self.temperature != 1.0:
            wanted.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            wanted.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            wanted.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            wanted.append(MinPLogitsWarper(self.min_p))
        return wanted


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


@dataclass
class _Row:
    """A completion in the making, and the uniforms that will draw its tokens."""

    prompt_ids: list[int]
    completion: Completion
    max_new_tokens: int
    uniforms: list[float]


@dataclass
class DecodeStats:
    """What a decode did: forward passes of each kind, and tokens that passed through the model."""

    prefills: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    row_steps: int = 0


# Called before every forward pass with whether this rank still decodes; says whether any rank does.
Synchroniser = Callable[[bool], bool]


@dataclass
class Decoder:
    """Decodes requests with a causal LM whose parameters are whole, or fetched by hooks (then give `synchroniser`).

    Args:
        max_rows: rows that decode together; bounds the KV cache.
        prefill_tokens: tokens of one prefill batch, padding included; bounds its activations.
        synchroniser: for a model that is partitioned over ranks, whose forwards all ranks must enter together.
        device: where the model computes; by default where its parameters are (offloaded ones are elsewhere).
    """

    model: nn.Module
    sampling: Sampling
    max_rows: int
    prefill_tokens: int = 16384
    synchroniser: Synchroniser | None = None
    device: torch.device | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)

    @torch.no_grad()
    def decode(self, requests: list[Request]) -> list[list[Completion]]:
        """Completions of each request, in the order of its seeds. An over-long prompt gets empty ones."""
        self._device = self.device or next(self.model.parameters()).device
        self._warpers = self.sampling.warpers()
        results, waiting = self._admit(requests)
        self._live: list[_Row] = []
        self._cache = DynamicCache()
        self._mask_RL = torch.zeros(0, 0, dtype=torch.bool, device=self._device)
        while waiting or self._live:
            free = self.max_rows - len(self._live)
            # A prefill costs a forward pass however few rows it brings: wait until an eighth of the rows is free.
            if waiting and (not self._live or free >= min(sum(map(len, waiting)), max(1, self.max_rows // 8))):
                self._prefill(waiting, free)
            else:
                self._step()
            self._drop_finished()
        while self.synchroniser is not None and self.synchroniser(False):
            self._idle_forward()
        return results

    def _admit(self, requests: list[Request]) -> tuple[list[list[Completion]], list[list[_Row]]]:
        """The result lists, and the rows still to decode, longest prompts first so that a batch has like lengths."""
        results, waiting = [], []
        for request in requests:
            longest = min(request.max_new_tokens or self.sampling.max_new_tokens, self.sampling.max_new_tokens)
            room = min(longest, self.sampling.context_size - len(request.prompt_ids))
            completions = [Completion([]) for _ in request.seeds]
            results.append(completions)
            if room > 0 and completions:
                draws = [[] if self.sampling.greedy else uniform_draws(seed, room) for seed in request.seeds]
                rows = [_Row(request.prompt_ids, c, room, u) for c, u in zip(completions, draws, strict=True)]
                waiting += [rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows)]
        waiting.sort(key=lambda rows: -len(rows[0].prompt_ids))
        return results, waiting

    def _prefill(self, waiting: list[list[_Row]], free: int) -> None:
        """Run the next prompts, draw their first tokens, and join them to the live rows."""
        batch: list[list[_Row]] = []
        width = len(waiting[0][0].prompt_ids)
        while waiting and len(waiting[0]) <= free and (not batch or (len(batch) + 1) * width <= self.prefill_tokens):
            batch.append(waiting.pop(0))
            free -= len(batch[-1])
        if not batch:  # the next prompt wants more rows at once than are free
            return self._step()
        prompts = [rows[0].prompt_ids for rows in batch]
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=self._device)
        cache = build_cache(self.model.config)
        logits = self._forward(ids, mask, cache)
        self.stats.prefills += 1
        self.stats.prefill_tokens += ids.numel()
        copies = torch.tensor([row for row, rows in enumerate(batch) for _ in rows], device=self._device)
        if len(copies) != len(batch):
            cache.batch_select_indices(copies)
        self._join(cache, mask[copies], [row for rows in batch for row in rows])
        return self._draw(logits[copies], self._live[-len(copies) :])

    def _step(self) -> None:
        """One more token for every live row."""
        last = torch.tensor([[row.completion.token_ids[-1]] for row in self._live], device=self._device)
        self._mask_RL = torch.cat([self._mask_RL, self._mask_RL.new_ones(len(self._live), 1)], dim=1)
        logits = self._forward(last, self._mask_RL, self._cache)
        self.stats.steps += 1
        self.stats.row_steps += len(self._live)
        self._draw(logits, self._live)

    def _forward(self, ids: torch.Tensor, mask_RL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """fp32 logits of the last position, [R, V]. Position ids are explicit: learned positions need them."""
        if self.synchroniser is not None:
            self.synchroniser(True)
        positions = (mask_RL.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask_RL,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _idle_forward(self) -> None:
        """Take part in the other ranks' gathers."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self.model(input_ids=one, use_cache=False, logits_to_keep=1)

    def _draw(self, logits_RV: torch.Tensor, rows: list[_Row]) -> None:
        """Append one token to each row."""
        logits_RV[:, self.sampling.vocab_size :] = -torch.inf
        young = [
            index for index, row in enumerate(rows) if len(row.completion.token_ids) < self.sampling.min_new_tokens
        ]
        if young:
            stops = torch.tensor(self.sampling.stop_ids, device=self._device)
            logits_RV[torch.tensor(young, device=self._device)[:, None], stops] = -torch.inf
        context = self._context(rows) if self.sampling.repetition_penalty != 1.0 else None
        for warper in self._warpers:
            logits_RV = warper(context, logits_RV)
        if self.sampling.greedy:
            drawn = logits_RV.argmax(-1)
        else:
            uniforms = torch.tensor([row.uniforms[len(row.completion.token_ids)] for row in rows], dtype=torch.float64)
            drawn = inverse_cdf(logits_RV, uniforms.to(self._device))
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.completion.token_ids.append(token)
            row.completion.stopped = token in self.sampling.stop_ids

    def _context(self, rows: list[_Row]) -> torch.Tensor:
        """Tokens so far, [R, L]. Left-padded with a row's own first token, as the penalty would hit a pad id."""
        texts = [row.prompt_ids + row.completion.token_ids for row in rows]
        width = max(map(len, texts))
        return torch.tensor([[text[0]] * (width - len(text)) + text for text in texts], device=self._device)

    def _join(self, cache: DynamicCache, mask: torch.Tensor, rows: list[_Row]) -> None:
        """Append freshly prefilled rows to the live ones, padding the shorter cache on the left."""
        if not self._live:
            self._cache, self._mask_RL, self._live = cache, mask, rows
            return
        width = max(mask.shape[1], self._mask_RL.shape[1])
        for one in (cache, self._cache):
            pad_left(one, width)
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            ours.keys = torch.cat([ours.keys, theirs.keys])
            ours.values = torch.cat([ours.values, theirs.values])
            theirs.keys = theirs.values = None
        self._mask_RL = torch.cat([nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self._mask_RL, mask)])
        self._live += rows

    def _drop_finished(self) -> None:
        """Take finished rows out of the cache, and the columns that only they used."""
        keep = [
            i
            for i, r in enumerate(self._live)
            if not r.completion.stopped and len(r.completion.token_ids) < r.max_new_tokens
        ]
        if len(keep) == len(self._live):
            return
        self._live = [self._live[i] for i in keep]
        if not keep:
            self._cache, self._mask_RL = DynamicCache(), self._mask_RL[:0, :0]
            return
        kept = torch.tensor(keep, device=self._device)
        self._mask_RL = self._mask_RL[kept]
        self._cache.batch_select_indices(kept)
        # the cache lacks the last drawn token, so a row's columns are its prompt and all its tokens but one
        longest = max(len(r.prompt_ids) + len(r.completion.token_ids) - 1 for r in self._live)
        unused = self._mask_RL.shape[1] - longest
        if unused:
            self._mask_RL = self._mask_RL[:, unused:]
            trim_left(self._cache, unused)


def uniform_draws(seed: int, count: int) -> list[float]:
    """The uniforms of one sample, from its own seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def inverse_cdf(logits_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draw one id per row: the first whose cumulated probability exceeds the row's uniform, int64 [R]."""
    cumulated_RV = torch.softmax(logits_RV, dim=-1).cumsum(-1, dtype=torch.float64)
    aim_R1 = (uniform_R * cumulated_RV[:, -1])[:, None]
    return torch.searchsorted(cumulated_RV, aim_R1, right=True)[:, 0].clamp_max(logits_RV.shape[1] - 1)

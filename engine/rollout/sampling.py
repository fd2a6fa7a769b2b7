"""How the next token of each sequence is drawn from the logits.

The logits processors are transformers'. A sequence draws with uniforms from a seed of its own, so that its tokens do
not depend on what it shares the decoder with. Knows nothing of caches, or of which sequence is decoded when.

Shapes: B sequences, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.rollout.sequence import Sequence


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        stop_ids: ids that end a completion; the id itself belongs to it.
        vocab_size: ids from here on are never drawn (vocabulary rows that only one of two models has).
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


class Sampler:
    """Draws the next tokens of any sequences, as a `Sampling` says, on a device."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        self.warpers = sampling.warpers()
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)

    def draw(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> None:
        """Append one token to each sequence. Writes into the logits."""
        sampling = self.sampling
        logits_BV[:, sampling.vocab_size :] = -torch.inf
        young = [place for place, s in enumerate(sequences) if s.num_new_tokens < sampling.min_new_tokens]
        if young:
            logits_BV[torch.tensor(young, device=self.device)[:, None], self.stop_ids] = -torch.inf
        context_BL = self._context(sequences) if sampling.repetition_penalty != 1.0 else None
        for warper in self.warpers:
            logits_BV = warper(context_BL, logits_BV)
        if sampling.greedy:
            drawn_B = logits_BV.argmax(-1)
        else:
            uniform_B = torch.tensor([s.next_uniform for s in sequences], dtype=torch.float64)
            drawn_B = inverse_cdf(logits_BV, uniform_B.to(self.device))
        for sequence, token_id in zip(sequences, drawn_B.tolist(), strict=True):
            sequence.append(token_id, is_stop=token_id in sampling.stop_ids)

    def _context(self, sequences: list[Sequence]) -> torch.Tensor:
        """Tokens so far, [B, L]. Left-padded with a sequence's own first token, as the penalty would hit a pad id."""
        texts = [s.prompt_ids + s.completion.token_ids for s in sequences]
        width = max(map(len, texts))
        return torch.tensor([[text[0]] * (width - len(text)) + text for text in texts], device=self.device)


def uniform_draws(seed: int, count: int) -> list[float]:
    """The uniforms of one sequence, from its own seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def inverse_cdf(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Draw one id per sequence: the first whose cumulated probability exceeds its uniform, int64 [B]."""
    cumulated_BV = torch.softmax(logits_BV, dim=-1).cumsum(-1, dtype=torch.float64)
    aim_B1 = (uniform_B * cumulated_BV[:, -1])[:, None]
    return torch.searchsorted(cumulated_BV, aim_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)

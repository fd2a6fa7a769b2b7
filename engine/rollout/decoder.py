"""A continuous decoder: sequences that finish leave the KV cache at once, waiting prompts take their place.

Cost follows the tokens that are generated, not sequences times the longest. What is decoded when is in `schedule`, the
live sequences and their cache in `slots`, the drawing of tokens in `sampling`; here are the forward passes. A
completion's tokens do not depend on which sequences, ranks or batches it shares the decoder with (exactly so up to
rounding of the logits; in fp32 the tokens agree).

Shapes: B sequences of a forward pass, L cache columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache

from engine.rollout.cache import build_cache
from engine.rollout.completer import Completion, Request
from engine.rollout.sampling import Sampler, Sampling
from engine.rollout.schedule import Schedule
from engine.rollout.sequence import Sequence
from engine.rollout.slots import Slots

# Called before every forward pass with whether this rank still decodes; says whether any rank does.
Synchroniser = Callable[[bool], bool]


@dataclass
class DecodeStats:
    """What a decoder did: forward passes of each kind, and tokens that passed through the model.

    `prefill_tokens` counts padding; `step_tokens` has one for each sequence that a step went on with.
    """

    prefills: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    step_tokens: int = 0


@dataclass(frozen=True)
class Decoder:
    """Decodes requests with a causal LM whose parameters are whole, or fetched by hooks (then give `synchroniser`).

    Args:
        num_slots: sequences that decode together; bounds the KV cache.
        prefill_tokens: tokens of one prefill batch, padding included; bounds its activations.
        synchroniser: for a model that is partitioned over ranks, whose forwards all ranks must enter together.
        device: where the model computes; by default where its parameters are (offloaded ones are elsewhere).
    """

    model: nn.Module
    sampling: Sampling
    num_slots: int
    prefill_tokens: int = 16384
    synchroniser: Synchroniser | None = None
    device: torch.device | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)

    @torch.no_grad()
    def decode(self, requests: list[Request]) -> list[list[Completion]]:
        """Completions of each request, in the order of its seeds. An over-long prompt gets empty ones."""
        return _Decoding(self, requests).run()


class _Decoding:
    """One run of a decoder over some requests."""

    def __init__(self, decoder: Decoder, requests: list[Request]) -> None:
        self.model, self.synchroniser, self.stats = decoder.model, decoder.synchroniser, decoder.stats
        self.device = decoder.device or next(decoder.model.parameters()).device
        self.schedule = Schedule(requests, decoder.sampling, decoder.num_slots, decoder.prefill_tokens)
        self.sampler = Sampler(decoder.sampling, self.device)
        self.slots = Slots(self.device)

    def run(self) -> list[list[Completion]]:
        while self.slots.sequences or not self.schedule.is_empty:
            groups = self.schedule.next_prefill(len(self.slots))
            if groups:
                self._prefill(groups)
            else:
                self._step()
            self.slots.drop_finished()
        while self.synchroniser is not None and self.synchroniser(False):
            self._idle_forward()
        return self.schedule.completions

    def _prefill(self, groups: list[list[Sequence]]) -> None:
        """Run each group's prompt once, draw the first token of its sequences, and join them to the live ones."""
        prompts = [group[0].prompt_ids for group in groups]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=self.device)
        cache = build_cache(self.model.config)
        logits = self._forward(ids, mask, cache)
        self.stats.prefills += 1
        self.stats.prefill_tokens += ids.numel()
        sequences = [sequence for group in groups for sequence in group]
        copies = torch.tensor([place for place, group in enumerate(groups) for _ in group], device=self.device)
        if len(sequences) != len(groups):
            cache.batch_select_indices(copies)
        self.slots.join(sequences, cache, mask[copies])
        self.sampler.draw(logits[copies], sequences)

    def _step(self) -> None:
        """One more token for every live sequence."""
        slots = self.slots
        last = torch.tensor([[s.completion.token_ids[-1]] for s in slots.sequences], device=self.device)
        slots.add_column()
        logits = self._forward(last, slots.mask_BL, slots.cache)
        self.stats.steps += 1
        self.stats.step_tokens += len(slots)
        self.sampler.draw(logits, slots.sequences)

    def _forward(self, ids: torch.Tensor, mask_BL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """fp32 logits of the last position, [B, V]. Position ids are explicit: learned positions need them."""
        if self.synchroniser is not None:
            self.synchroniser(True)
        positions = (mask_BL.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask_BL,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _idle_forward(self) -> None:
        """Take part in the other ranks' gathers."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model(input_ids=one, use_cache=False, logits_to_keep=1)

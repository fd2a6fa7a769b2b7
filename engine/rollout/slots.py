"""The decoder's slots: the live sequences, with their KV cache.

All end at the same column of the cache; shorter ones are masked on the left.

Shapes: B live sequences, L cache columns.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

from engine.rollout import cache as kv
from engine.rollout.sequence import Sequence, Status


class Slots:
    """Live sequences, their cache, and which of its columns are theirs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sequences: list[Sequence] = []
        self.cache = DynamicCache()
        self.mask_BL = torch.zeros(0, 0, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.sequences)

    def add_column(self) -> None:
        """Make room in the mask for the next token of every sequence; the forward pass appends to the cache."""
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(self), 1)], dim=1)

    def join(self, sequences: list[Sequence], cache: DynamicCache, mask_BL: torch.Tensor) -> None:
        """Append freshly prefilled sequences to the live ones, padding the shorter cache on the left.

        `cache` must not be used afterwards.
        """
        if not self.sequences:
            self.sequences, self.cache, self.mask_BL = sequences, cache, mask_BL
            return
        width = max(mask_BL.shape[1], self.mask_BL.shape[1])
        for one in (cache, self.cache):
            kv.pad_left(one, width)
        kv.join(self.cache, cache)
        self.mask_BL = torch.cat([nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask_BL, mask_BL)])
        self.sequences = self.sequences + sequences

    def drop_finished(self) -> None:
        """Take finished sequences out of the cache, and the columns that only they used."""
        keep = [place for place, s in enumerate(self.sequences) if s.status is not Status.FINISHED]
        if len(keep) == len(self):
            return
        self.sequences = [self.sequences[place] for place in keep]
        if not keep:
            self.cache, self.mask_BL = DynamicCache(), self.mask_BL[:0, :0]
            return
        kept = torch.tensor(keep, device=self.device)
        self.mask_BL = self.mask_BL[kept]
        self.cache.batch_select_indices(kept)
        unused = self.mask_BL.shape[1] - max(s.num_cached for s in self.sequences)
        if unused:
            self.mask_BL = self.mask_BL[:, unused:]
            kv.trim_left(self.cache, unused)

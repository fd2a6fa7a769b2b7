"""The decoder's KV cache: transformers' dynamic layers, of which those without a window grow in place.

Written against the dynamic cache layers of transformers 5.23, whose `keys`, `values` and `cumulative_length` this room
edits. `DynamicLayer` itself concatenates, which copies the whole cache for every token.

Shapes: B sequences, heads, L columns, head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE_COLUMNS = 16


class SpareLayer(DynamicLayer):
    """A dynamic layer with a few columns to spare behind the last, so that most tokens are written in place."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns; returns all keys and values, which are views where there are columns to spare."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


def build_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [SpareLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def append(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`held` with the columns `new` behind it: written into the spare columns behind `held` where it has enough, else
    copied with them into a larger tensor. `held` must not be used afterwards."""
    if not held.numel():
        return new.clone(memory_format=torch.contiguous_format)
    before, length = held.shape[2], held.shape[2] + new.shape[2]
    # A head of a sequence holds stride(1) / stride(2) columns, and a cut on the left moved the start into them.
    if length > (held.stride(1) - held.storage_offset()) // held.stride(2):
        grown = held.new_empty(*held.shape[:2], length + SPARE_COLUMNS, held.shape[3])[:, :, :length]
        grown[:, :, :before] = held
    else:
        grown = held.as_strided((*held.shape[:2], length, held.shape[3]), held.stride(), held.storage_offset())
    grown[:, :, before:] = new
    return grown


def _kept_columns(layer: DynamicLayer, length: int) -> int:
    """Columns that a layer holds after `length` tokens; sliding layers keep one less than their window."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def join(ours: DynamicCache, theirs: DynamicCache) -> None:
    """Append the sequences of `theirs`, which has as many columns and is left empty, to those of `ours`."""
    for held, new in zip(ours.layers, theirs.layers, strict=True):
        held.keys = torch.cat([held.keys, new.keys])
        held.values = torch.cat([held.values, new.values])
        new.keys = new.values = None


def pad_left(cache: DynamicCache, length: int) -> None:
    """Make the cache look as if `length` columns had been seen, with masked ones on the left."""
    for layer in cache.layers:
        grow = _kept_columns(layer, length) - layer.keys.shape[-2]
        if grow > 0:
            layer.keys, layer.values = (nn.functional.pad(x, (0, 0, grow, 0)) for x in (layer.keys, layer.values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length


def trim_left(cache: DynamicCache, columns: int) -> None:
    """Forget the leftmost columns, which no sequence uses."""
    for layer in cache.layers:
        kept = _kept_columns(layer, layer.get_seq_length() - columns)
        layer.keys, layer.values = (x[:, :, x.shape[-2] - kept :] for x in (layer.keys, layer.values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= columns

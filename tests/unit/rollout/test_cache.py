"""The cache that grows in place holds what transformers' own, which concatenates, holds."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer

from engine.rollout.cache import SPARE_COLUMNS, SpareLayer, build_cache, pad_left, trim_left

CONFIG = LlamaConfig(num_hidden_layers=1)


def states(sequences: int, heads: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as attention hands them over: slices of one projection, heads and columns swapped."""
    joint = torch.randn(sequences, columns, heads, 10, generator=generator).transpose(1, 2)
    return joint[..., :6], joint[..., 6:]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_edits_equals_concatenation(seed, heads):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = build_cache(CONFIG), build_cache(CONFIG)
    theirs.layers = [DynamicLayer()]
    assert type(ours.layers[0]) is SpareLayer
    sequences = 4
    for cache in (ours, theirs):
        cache.update(*states(sequences, heads, 7, torch.Generator().manual_seed(99)), 0)
    for edit in torch.randint(0, 8, (200,), generator=generator).tolist():
        if edit < 5:
            new = states(sequences, heads, 1 + 2 * (edit == 4), generator)
            for cache in (ours, theirs):
                returned = cache.update(*(x.clone() for x in new), 0)
                assert returned[0].shape == cache.layers[0].keys.shape
        elif edit == 5:
            kept = torch.randint(0, sequences, (4,), generator=generator)
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
        else:
            for cache in (ours, theirs):
                length = cache.get_seq_length()
                trim_left(cache, 2) if edit == 6 and length > 4 else pad_left(cache, length + 1)
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)


def test_most_tokens_copy_nothing_but_themselves():
    layer, generator, moved = SpareLayer(), torch.Generator().manual_seed(0), 0
    layer.update(*states(2, 3, 5, generator))
    for _ in range(10 * (SPARE_COLUMNS + 1)):
        place = layer.keys.data_ptr()
        layer.update(*states(2, 3, 1, generator))
        moved += layer.keys.data_ptr() != place
    assert moved == 10

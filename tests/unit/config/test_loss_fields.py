"""Fields of the loss that contradict each other, and the tokens that TRL's normalisation counts."""

from __future__ import annotations

import pytest

from engine import GKDConfig
from engine.data.batch import Sample, pack


def test_label_smoothing_needs_the_term_it_smooths():
    assert GKDConfig(label_smoothing_factor=0.1, sft_weight=0.5).label_smoothing_factor == 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 smooths the likelihood term"):
        GKDConfig(label_smoothing_factor=0.1)


def test_references_are_counted_where_a_rollout_took_their_place():
    row = Sample([1, 2], [1, 2, 3, 4, 5], [False, False, True, True, True], 0)
    written = row.with_response([7]).with_response([7, 8], index=3)
    batch = pack([row, written], "cpu")
    assert (batch.num_references, batch.num_response_tokens) == (6, 5)

"""Which rank takes what of a global batch, and a sample whose answer is written anew."""

from __future__ import annotations

import pytest

from engine.data.batch import Sample
from engine.data.order import places_of_rank


@pytest.mark.parametrize("count,world_size,batch_size", [(24, 2, 3), (24, 4, 3), (7, 2, 2), (1, 4, 2), (0, 2, 2)])
def test_each_place_is_one_ranks(count, world_size, batch_size):
    """Place i is in micro-batch i // (W*B) of rank (i % (W*B)) // B; ranks have equally many micro-batches."""
    ranks = [places_of_rank(count, rank, world_size, batch_size) for rank in range(world_size)]
    together = world_size * batch_size
    assert {len(batches) for batches in ranks} == {-(-count // together)}
    found = {place: (rank, micro) for rank, m in enumerate(ranks) for micro, places in enumerate(m) for place in places}
    assert found == {i: ((i % together) // batch_size, i // together) for i in range(count)}


def test_a_new_response_takes_the_place_of_the_old():
    old = Sample([1, 2], [1, 2, 8, 9, 7], [False, False, True, True, False], index=5)
    assert old.with_response([3, 4]) == Sample(
        [1, 2], [1, 2, 3, 4], [False, False, True, True], index=5, num_references=2
    )
    assert old.with_response([], index=11) == Sample([1, 2], [1, 2], [False, False], index=11, num_references=2)

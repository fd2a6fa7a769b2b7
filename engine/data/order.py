"""The order of rows, as a pure function of a seed, and which rank takes what: no state, no datasets.

Position k of a run is row `permutation(seed, k // n)[k % n]`: epochs one after another. So a run resumes from one
integer, at any world size. Ranks are numbers here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def epoch_generator(seed: int, epoch: int) -> np.random.RandomState:
    """Random numbers of one epoch. `RandomState` is frozen by numpy's policy: an order survives an upgrade."""
    entropy = np.random.SeedSequence([seed % 2**64, epoch])
    return np.random.RandomState(np.random.MT19937(entropy))


def shuffled(items: Iterable[Item], generator: np.random.RandomState, buffer_size: int) -> Iterator[Item]:
    """Each item once, drawn at random from a buffer that holds the next `buffer_size`."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = generator.randint(buffer_size)
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in generator.permutation(len(buffer)))


def places_of_rank(count: int, rank: int, world_size: int, batch_size: int) -> list[range]:
    """The places in a global batch of `count` that a rank takes, one range for each of its micro-batches.

    With W ranks and B places in a micro-batch, place i goes to micro-batch `i // (W*B)` of rank `(i % (W*B)) // B`.
    Every rank gets the same number of micro-batches; where W*B does not divide `count`, the last may be shorter, or
    empty.
    """
    num_batches = -(-count // (world_size * batch_size))
    starts = [(micro * world_size + rank) * batch_size for micro in range(num_batches)]
    return [range(min(start, count), min(start + batch_size, count)) for start in starts]


def copy_indices(index: int, copies: int) -> range:
    """The `index` of each sample that is written for the prompt of sample `index`."""
    return range(index * copies, (index + 1) * copies)


class DataOrder:
    """Position in the run to row: epochs one after another, each its own permutation of (seed, epoch)."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
        self._permutation = functools.lru_cache(maxsize=2)(self._build_permutation)  # a step may touch two epochs

    def row(self, position: int) -> int:
        epoch, place = divmod(position, self._num_rows)
        return int(self._permutation(epoch)[place]) if self._shuffle else place

    def _build_permutation(self, epoch: int) -> np.ndarray:
        return epoch_generator(self._seed, epoch).permutation(self._num_rows)

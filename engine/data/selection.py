"""Which rows of a source a run uses, with random access (`MapRows`) or as a stream (`StreamRows`), as samples in order.

A row that cannot be used ends the run or is left out, as `on_bad_row` says; one whose prompt fills `max_length` is
dropped; one without an answer serves steps on which the answer is written anew. Whatever is left out is counted and
told on rank 0. No collectives.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from itertools import count as count_up
from itertools import islice
from typing import NamedTuple

import numpy as np

from engine.data.batch import Sample
from engine.data.encoding import BAD, NO_ROOM, RowEncoder, encode_source
from engine.data.order import DataOrder, epoch_generator, shuffled
from engine.data.sources import (
    FINGERPRINT_STREAM_ROWS,
    Source,
    fingerprint,
    is_arrow,
    place_of,
    stream_rows,
)
from engine.data.tally import NAMED_ROWS, RowRules, Tally

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER_ROWS = 10_000  # of a stream
BLOCK_ROWS = 10_000


class MapRows:
    """Rows with random access; `rows[i]` is the sample of the i-th row that is used.

    Construction checks and tokenises every row, or finds that done; then samples are read from an Arrow file.

    Raises:
        ValueError: for no rows, one that cannot be used, no answer where one is needed, or no prompt that fits.
    """

    def __init__(
        self, source: Source, encoder: RowEncoder, name: str, rules: RowRules | None = None, rank: int = 0
    ) -> None:
        self.rules, rows_key = rules or RowRules(), fingerprint(source)
        tally = Tally(name, self.rules, encoder.max_length)
        tally.num_rows = len(source) if self.rules.limit is None else min(len(source), self.rules.limit)
        if tally.num_rows:
            self._encoded = encode_source(
                source, name, encoder, tally.num_rows, self.rules.num_proc, rows_key
            ).with_format("numpy")
            num_responses = self._count(tally, source)
        tally.check()
        # What a function made of the rows is told by its result: its code may hash otherwise on another host.
        self.fingerprint = rows_key if encoder.formatting_func is None else fingerprint(self._encoded)
        if rank == 0:
            tally.report()
        self._kept = np.flatnonzero(num_responses >= (1 if self.rules.answers == "all" else 0))
        self._answered = np.flatnonzero(num_responses > 0)
        self._order = functools.lru_cache(maxsize=2)(DataOrder)

    def _count(self, tally: Tally, source: Source) -> np.ndarray:
        """The column `num_responses`, counted."""
        columns = self._encoded.select_columns(["num_responses", "problem", "notes"]).with_format("arrow")
        blocks = []
        for start, table in zip(count_up(0, BLOCK_ROWS), columns.iter(BLOCK_ROWS), strict=False):
            numbers = table["num_responses"].to_numpy()
            bad = np.flatnonzero(numbers == BAD)
            named = bad[: max(0, NAMED_ROWS - tally.num_bad)]
            for row, problem in zip(named, table["problem"].take(named).to_pylist(), strict=True):
                tally.add_bad(place_of(source, tally.name, start + int(row)), problem)
            tally.num_bad += len(bad) - len(named)
            tally.num_without_room += int((numbers == NO_ROOM).sum())
            tally.num_answered += int((numbers > 0).sum())
            tally.num_prompts += int((numbers == 0).sum())
            tally.notes.update(note for notes in table["notes"].to_pylist() for note in notes or ())
            blocks.append(numbers)
        return np.concatenate(blocks)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Sample:
        """Sample of the i-th row that is used; its `index` is the row's number in the source, from 0."""
        number = int(self._kept[i])
        return self._sample(number, index=number)

    def _sample(self, number: int, index: int) -> Sample:
        row = self._encoded[number]
        return Sample(row["prompt_ids"].tolist(), row["input_ids"].tolist(), row["response_mask"].tolist(), index)

    @property
    def has_bare_prompts(self) -> bool:
        """Whether a row that is used has no answer."""
        return len(self._answered) < len(self._kept)

    def lacks_answers(self, first: int, count: int, seed: int, shuffle: bool) -> bool:
        """Whether steps on the dataset need an order of their own: some rows have an answer, and some none."""
        return self.rules.answers == "some" and self.has_bare_prompts

    def sampler(
        self, first: int, count: int, seed: int, shuffle: bool, answered: bool = False
    ) -> Callable[[int], Sample]:
        """Gives the sample at position `first + i` of the run, with `index` i, for i < count; read when asked for.

        With `answered`, positions count in the order over the rows with an answer alone.
        """
        rows = self._answered if answered else self._kept
        order = self._order(len(rows), seed, shuffle)
        return lambda i: self._sample(int(rows[order.row(first + i)]), index=i)


class _Tokens(NamedTuple):
    """A sample as arrays, of which a shuffle buffer holds many."""

    prompt_ids: np.ndarray
    input_ids: np.ndarray
    response_mask: np.ndarray

    @property
    def has_answer(self) -> bool:
        return bool(self.response_mask[1:].any())

    def sample(self, index: int) -> Sample:
        return Sample(self.prompt_ids.tolist(), self.input_ids.tolist(), self.response_mask.tolist(), index)


class _Cursor:
    """A place in an endless order of rows; going back starts it anew and skips."""

    def __init__(self, rows: Iterator[_Tokens]) -> None:
        self._rows, self._position = rows, 0
        self._last: tuple[int, list[_Tokens]] = (0, [])

    def can_read(self, first: int) -> bool:
        return first >= self._position or first == self._last[0]

    def read(self, first: int, count: int) -> list[_Tokens]:
        if first != self._last[0] or len(self._last[1]) != count:
            skipped = first - self._position
            self._last = (first, list(islice(self._rows, skipped, skipped + count)))
            self._position = first + count
        return self._last[1]


class StreamRows:
    """Rows that are read in order, epoch after epoch; each is checked and tokenised when it is read.

    With shuffling, a row is drawn from a buffer of the next `SHUFFLE_BUFFER_ROWS`, by a generator seeded with
    (seed, epoch). Going back restarts the stream and skips. Rows with an answer have an order of their own, read by a
    second cursor.
    """

    def __init__(
        self, source: Source, encoder: RowEncoder, name: str, rules: RowRules | None = None, rank: int = 0
    ) -> None:
        self._source, self._encoder, self._name, self._rank = source, encoder, name, rank
        self.rules = rules or RowRules()
        self._cursors: dict[tuple[int, bool, bool], _Cursor] = {}
        if rank == 0:
            logger.info("%s is a stream: its rows are checked as they are read, not before training", name)

    @functools.cached_property
    def fingerprint(self) -> str:
        if self._encoder.formatting_func is None:
            return fingerprint(self._source)
        first = islice(stream_rows(self._source), FINGERPRINT_STREAM_ROWS)
        return fingerprint([self._encoder.formatted(raw) for raw in first])

    def lacks_answers(self, first: int, count: int, seed: int, shuffle: bool) -> bool:
        """Whether one of the rows at these positions has no answer for a step on the dataset."""
        return self.rules.answers == "some" and not all(t.has_answer for t in self._read(first, count, seed, shuffle))

    def sampler(
        self, first: int, count: int, seed: int, shuffle: bool, answered: bool = False
    ) -> Callable[[int], Sample]:
        """As `MapRows.sampler`; the rows are read at once.

        Raises:
            ValueError: for a row that cannot be used, and at the end of an epoch as `MapRows` does.
        """
        rows = self._read(first, count, seed, shuffle, answered)
        return lambda i: rows[i].sample(index=i)

    def _read(self, first: int, count: int, seed: int, shuffle: bool, answered: bool = False) -> list[_Tokens]:
        key = (seed, shuffle, answered)
        if key not in self._cursors or not self._cursors[key].can_read(first):
            self._cursors[key] = _Cursor(self._endless(*key))
        return self._cursors[key].read(first, count)

    def _endless(self, seed: int, shuffle: bool, answered: bool) -> Iterator[_Tokens]:
        for epoch in count_up():
            rows = self._usable(answered, report=epoch == 0 and not answered and self._rank == 0)
            yield from shuffled(rows, epoch_generator(seed, epoch), SHUFFLE_BUFFER_ROWS) if shuffle else rows

    def _usable(self, answered: bool, report: bool) -> Iterator[_Tokens]:
        """The rows that are used; at the end, the checks of the whole."""
        tally = Tally(self._name, self.rules, self._encoder.max_length)
        needs_answer = answered or self.rules.answers == "all"
        for index, raw in enumerate(islice(stream_rows(self._source), self.rules.limit)):
            place = place_of(self._source, self._name, index)
            outcome = self._encoder.outcome(raw, place, is_arrow(self._source))
            tally.add(place, outcome)
            if outcome.problem is not None:
                self._pass_over(place, outcome.problem, tally.num_bad, report)
            if outcome.encoded is not None and (outcome.num_responses or not needs_answer):
                prompt_ids, input_ids, mask = outcome.encoded
                yield _Tokens(np.array(prompt_ids, np.int32), np.array(input_ids, np.int32), np.array(mask, bool))
        tally.check()
        if report:
            tally.report()

    def _pass_over(self, place: str, problem: str, number: int, report: bool) -> None:
        if self.rules.on_bad_row == "error":
            raise ValueError(f"{place}: {problem} (on_bad_row=skip leaves such rows out)")
        if report and number <= NAMED_ROWS:
            logger.warning("%s: %s; skipped (on_bad_row=skip)", place, problem)

"""From rows to the samples of a step.

The order is stateless: position k of the run is row `permutation(seed, k // n)[k % n]`, so a run resumes from one
integer, and the same rows meet in a step at any world size and accumulation split. Rows are tokenised when a step
needs them, by the rank that trains on them; nothing is cached. Knows ranks only as numbers. No collectives.

A row whose prompt leaves no room for one token in `max_length` is dropped before training and counted. Completions
are cut to fit; a conversation loses its last turns first, and its prompt is never cut.
"""

from __future__ import annotations

import functools
import logging
import sys
from array import array
from collections.abc import Callable, Iterator
from itertools import count as count_up
from itertools import islice
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from engine.batch import Sample
from engine.chat import Encoded, encode_conversation, encode_prompt, encode_prompt_completion
from engine.config import GKDConfig
from engine.order import DataOrder, epoch_generator, shuffled
from engine.rows import Row, Source, as_source, load_rows, parse_row, place_of
from engine.vocabulary import check_ids

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER_ROWS = 10_000  # of a stream
SLACK_TOKENS = 16  # bos, and whatever a tokenizer adds at the edges of a text


class SampleEncoder:
    """Rows to samples of at most `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, num_embeddings: int = sys.maxsize) -> None:
        self._tokenizer, self._num_embeddings = tokenizer, num_embeddings
        self._max_length = max_length
        self._template_tokens: dict[tuple[str, ...], int] = {}

    def encode(self, row: Row, index: int) -> Sample | None:
        """The sample; None where the prompt leaves no room for a token.

        Raises:
            ValueError: where the chat template cannot express the row, or the models lack one of its tokens; the
                text names the row.
        """
        try:
            encoded = self._encode_fitting(row)
            if encoded is not None:
                check_ids((*encoded[0], *encoded[1]), self._num_embeddings, self._tokenizer)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        if encoded is None:
            return None
        prompt_ids, input_ids, response_mask = encoded
        return Sample(prompt_ids, input_ids[: self._max_length], response_mask[: self._max_length], index)

    def _encode_fitting(self, row: Row) -> Encoded | None:
        if row.messages is None:
            encoded = encode_prompt_completion(self._tokenizer, row.prompt, row.completion)
            return encoded if self._has_room(encoded, row.has_completion) else None
        ends = [len(row.messages)]
        if row.has_completion:  # where it does not fit: without its last turns
            turns = range(row.first_response, len(row.messages) - 1)
            ends += [i + 1 for i in reversed(turns) if row.messages[i]["role"] == "assistant"]
        for end in ends:
            encoded = encode_conversation(self._tokenizer, row.messages[:end], row.first_response)
            if self._has_room(encoded, row.has_completion):
                return encoded
        return None

    def _has_room(self, encoded: Encoded, has_completion: bool) -> bool:
        prompt_ids, _, response_mask = encoded
        return len(prompt_ids) < self._max_length and (not has_completion or any(response_mask[: self._max_length]))

    def fits(self, row: Row) -> bool:
        """Whether `encode` finds room for the row, told with as little work as it takes.

        Raises:
            ValueError: as `encode`.
        """
        if len(self._tokenizer) > self._num_embeddings:  # only the ids themselves say whether the models have them
            return self.encode(row, 0) is not None
        if row.messages is None:
            return len(row.prompt.encode()) + SLACK_TOKENS < self._max_length or self.encode(row, 0) is not None
        prompt = row.messages[:-1] if row.has_completion else row.messages
        num_bytes = sum(len(message["content"].encode()) for message in prompt)  # a token stands for at least one
        try:
            bound = num_bytes + self._count_template_tokens(prompt)
            if bound + SLACK_TOKENS >= self._max_length:
                bound = len(encode_prompt(self._tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        return bound + SLACK_TOKENS < self._max_length or self.encode(row, 0) is not None

    def _count_template_tokens(self, prompt: list[dict[str, Any]]) -> int:
        """Tokens that the template adds to messages of these roles; `max_length` where their content may change it."""
        if any("tool_calls" in message for message in prompt):
            return self._max_length
        roles = tuple(message["role"] for message in prompt)
        if roles not in self._template_tokens:
            stand_in = [{"role": role, "content": "x"} for role in roles]
            self._template_tokens[roles] = len(encode_prompt(self._tokenizer, stand_in))
        return self._template_tokens[roles]


class Rows:
    """A source with its tokenizer: reads rows in order, checks each, passes over those that cannot be used.

    Args:
        limit: use only the first so many rows.
        needs_completion: at least one row must have an answer to train on.
        rank: the number of dropped rows is logged on rank 0.
        num_embeddings: rows that the models' embeddings share; an id beyond them is an error.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
        limit: int | None = None,
        needs_completion: bool = False,
        rank: int = 0,
        num_embeddings: int = sys.maxsize,
    ) -> None:
        self._source, self._name, self._limit = source, name, limit
        self._needs_completion, self._max_length, self._rank = needs_completion, max_length, rank
        self._encoder = SampleEncoder(tokenizer, max_length, num_embeddings)

    @property
    def source(self) -> Source:
        return self._source

    def _usable(self, report: bool) -> Iterator[tuple[int, Row]]:
        """The rows whose prompt fits, with their number in the source; at the end, the checks of the whole.

        Long prompts are tokenised for that, the others only measured. The first row with an answer is encoded, so that
        a template which cannot be used says so at once.
        """
        num_rows, num_kept, has_completion = 0, 0, False
        for index, raw in enumerate(islice(self._source, self._limit)):
            num_rows += 1
            row = parse_row(raw, place_of(self._source, self._name, index))
            is_first_answer = row.has_completion and not has_completion
            has_completion = has_completion or row.has_completion
            if is_first_answer:
                self._encoder.encode(row, index)
            if self._encoder.fits(row):
                num_kept += 1
                yield index, row
        if num_rows == 0:
            raise ValueError(f"{self._name} is empty: it has no rows")
        if self._needs_completion and not has_completion:
            raise ValueError(
                f"{self._name}, rows 1 to {num_rows}: none has an assistant turn or completion to train on, which "
                "steps on the dataset need. Prompts alone can be used with lmbda=1, or with seq_kd=true"
            )
        if num_kept == 0:
            raise ValueError(f"{self._name}: every prompt fills max_length={self._max_length} tokens; raise max_length")
        if report and num_kept < num_rows and self._rank == 0:
            logger.warning(
                "%s: dropped %d of %d rows, whose prompt fills max_length=%d tokens",
                self._name, num_rows - num_kept, num_rows, self._max_length,
            )  # fmt: skip

    def _encode(self, row: Row, index: int) -> Sample:
        sample = self._encoder.encode(row, index)
        if sample is None:
            raise ValueError(
                f"{row.place}: its prompt fills max_length={self._max_length} tokens, though it measured less"
            )
        return sample


class MapRows(Rows):
    """Rows with random access; `rows[i]` tokenises the i-th row that is kept.

    Construction reads every row once.

    Raises:
        ValueError: for no rows, a malformed one, no answer anywhere where one is needed, or no prompt that fits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept = array("q", (index for index, _ in self._usable(report=True)))
        self._order = functools.lru_cache(maxsize=1)(functools.partial(DataOrder, len(self._kept)))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Sample:
        """Sample of the i-th kept row; its `index` is the row's number in the source, from 0."""
        return self.sample(i, index=self._kept[i])

    def sample(self, i: int, index: int) -> Sample:
        """Sample of the i-th kept row with the `index` given."""
        number = self._kept[i]
        row = parse_row(self._source[number], place_of(self._source, self._name, number))
        return self._encode(row, index)

    def sampler(self, first: int, count: int, seed: int, shuffle: bool) -> Callable[[int], Sample]:
        """Gives the sample at position `first + i` of the run, with `index` i, for i < count; read when asked for."""
        order = self._order(seed, shuffle)
        return lambda i: self.sample(order.row(first + i), index=i)


class StreamRows(Rows):
    """Rows that are read in order, epoch after epoch; each is checked when it is read.

    With shuffling, a row is drawn from a buffer of the next `SHUFFLE_BUFFER_ROWS`, by a generator seeded with
    (seed, epoch). Going back restarts the stream and skips.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._iterator: Iterator[Row] = iter(())
        self._position: int | None = None
        self._order: tuple[int, bool] | None = None

    def read(self, first: int, count: int, seed: int, shuffle: bool) -> list[Row]:
        """The rows at positions `first` to `first + count - 1` of the endless stream.

        Raises:
            ValueError: for a malformed row, and at the end of an epoch as `MapRows` does.
        """
        if self._position is None or first < self._position or self._order != (seed, shuffle):
            self._iterator, self._position, self._order = self._endless(seed, shuffle), 0, (seed, shuffle)
        rows = list(islice(self._iterator, first - self._position, first - self._position + count))
        self._position = first + count
        return rows

    def sampler(self, first: int, count: int, seed: int, shuffle: bool) -> Callable[[int], Sample]:
        """As `MapRows.sampler`; the rows are read, and not yet tokenised."""
        rows = self.read(first, count, seed, shuffle)
        return lambda i: self._encode(rows[i], index=i)

    def _endless(self, seed: int, shuffle: bool) -> Iterator[Row]:
        for epoch in count_up():
            rows = (row for _, row in self._usable(report=epoch == 0))
            yield from shuffled(rows, epoch_generator(seed, epoch), SHUFFLE_BUFFER_ROWS) if shuffle else rows


def build_rows(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: GKDConfig,
    split: str,
    rank: int = 0,
    num_embeddings: int = sys.maxsize,
) -> MapRows | StreamRows:
    """The checked rows of `data` (a dataset object, or None for `config.dataset_name`), before any model loads.

    For the training split, `dataset_streaming` and `max_samples` apply and answers are required unless every step
    can do without; for another, `eval_max_samples`.

    Raises:
        ValueError: as `load_rows` and `MapRows`, and for a stream that is not the training split.
    """
    is_train = split == config.dataset_train_split
    if data is None:
        name = f"{config.dataset_name}, split {split}"
        source = load_rows(config, split)
    else:
        name = "train_dataset" if is_train else "eval_dataset"
        source = as_source(data, split, name)
    limit = config.max_samples if is_train else config.eval_max_samples
    needs_completion = is_train and config.lmbda < 1 and not config.seq_kd
    is_stream = isinstance(source, IterableDataset) or (is_train and config.dataset_streaming)
    if is_stream and not is_train:
        raise ValueError(f"{name}: evaluation needs rows with a length, not a stream")
    if is_stream and config.max_steps < 0:
        raise ValueError(f"{name}: a stream has no length, so set max_steps")
    rows_type = StreamRows if is_stream else MapRows
    return rows_type(source, tokenizer, config.max_length, name, limit, needs_completion, rank, num_embeddings)


class StepData:
    """The samples that a rank trains on at a step; a pure function of (seed, step, place in the global batch).

    A global batch has A*W*B rows (accumulation, world, per device). Row i goes to micro-batch `i // (W*B)` of rank
    `(i % (W*B)) // B`, as a sample whose `index` is i.
    """

    def __init__(
        self, rows: MapRows | StreamRows, config: GKDConfig, world_size: int, rank: int, shuffle: bool = True
    ) -> None:
        self._rows, self._seed, self._shuffle = rows, config.seed, shuffle
        self._batch, self._world_size, self._rank = config.per_device_train_batch_size, world_size, rank
        self._accumulation = config.accumulation_steps(world_size)

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self._accumulation * self._world_size * self._batch

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, dropped ones not counted; ValueError for a stream."""
        if isinstance(self._rows, StreamRows):
            raise ValueError("a stream has no length: set max_steps")
        return len(self._rows)

    def steps_per_epoch(self, global_batch: int) -> float:
        """Optimizer steps of one epoch, with their fraction: epochs follow each other within a batch."""
        return self.num_rows / global_batch

    def step_batches(self, step: int) -> list[list[Sample]]:
        """This rank's micro-batches of optimizer step `step` (from 0): accumulation lists of B samples."""
        sample = self._rows.sampler(step * self.global_batch, self.global_batch, self._seed, self._shuffle)
        batches = []
        for micro in range(self._accumulation):
            start = (micro * self._world_size + self._rank) * self._batch
            batches.append([sample(i) for i in range(start, start + self._batch)])
        return batches


def eval_batches(rows: MapRows, rank: int, world_size: int, batch_size: int) -> list[list[Sample]]:
    """This rank's share of all rows, each used once over all ranks, in batches of at most `batch_size`.

    Every rank gets the same number of batches; the last may be shorter, or empty. A sample's `index` is its row's
    number in the source.
    """
    num_batches = -(-len(rows) // (world_size * batch_size))
    batches = []
    for number in range(num_batches):
        start = (number * world_size + rank) * batch_size
        batches.append([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
    return batches

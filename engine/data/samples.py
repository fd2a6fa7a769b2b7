"""From rows to the samples of a step.

The order is stateless: position k of the run is row `permutation(seed, k // n)[k % n]`, so a run resumes from its
position, and the same rows meet in a step at any world size and accumulation split. Where some rows have no answer,
steps on the dataset follow a second order, over the rows with one, and a run has two positions. Knows ranks only as
numbers. No collectives.
"""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.data.encoding import Format, RowEncoder
from engine.data.order import places_of_rank
from engine.data.rows import COLUMNS
from engine.data.selection import MapRows, StreamRows
from engine.data.sources import as_source, keep_columns, load_rows
from engine.data.tally import RowRules
from engine.data.template import TemplateInput


def build_rows(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: GKDConfig,
    split: str,
    rank: int = 0,
    now: datetime | None = None,
    num_embeddings: int = sys.maxsize,
    formatting_func: Format | None = None,
) -> MapRows | StreamRows:
    """The checked rows of `data` (a dataset object, or None for `config.dataset_name`), before any model loads.

    For the training split, `dataset_streaming` and `max_samples` apply and answers are required unless every step
    can do without; for another, `eval_max_samples`. `now` is what a chat template takes for today.

    Raises:
        ValueError: as `load_rows`, `RowEncoder` and `MapRows`, and for a stream that is not the training split.
    """
    is_train = split == config.dataset_train_split
    if data is None:
        name = f"{config.dataset_name}, split {split}"
        source = load_rows(config, split)
    else:
        name = "train_dataset" if is_train else "eval_dataset"
        source = as_source(data, split, name)
    is_stream = isinstance(source, IterableDataset) or (is_train and config.dataset_streaming)
    if is_stream and not is_train:
        raise ValueError(f"{name}: evaluation needs rows with a length, not a stream")
    if is_stream and config.max_steps < 0:
        raise ValueError(f"{name}: a stream has no length, so set max_steps")
    template = TemplateInput(kwargs=config.chat_template_kwargs, now=now)
    encoder = RowEncoder(
        tokenizer, config.max_length, template, num_embeddings, formatting_func, config.dataset_text_field,
        scores_whole=needed_answers(config) == "all",
    )  # fmt: skip
    rules = RowRules(
        limit=config.max_samples if is_train else config.eval_max_samples,
        answers=needed_answers(config) if is_train else "optional",
        on_bad_row=config.on_bad_row,
        num_proc=config.dataset_num_proc,
    )
    if formatting_func is None:
        source = keep_columns(source, (*COLUMNS, config.dataset_text_field))
    return (StreamRows if is_stream else MapRows)(source, encoder, name, rules, rank)


def needed_answers(config: GKDConfig) -> str:
    """Which rows need an answer, as in `RowRules`: steps on the dataset do, on-policy steps do not."""
    if config.seq_kd or config.lmbda == 1:
        return "optional"
    return "some" if config.lmbda > 0 else "all"


class StepData:
    """The samples that a rank trains on at a step: a pure function of (seed, number of the global batch, place in it).

    A global batch has A*W*B rows (accumulation, world, per device). Row i goes where `places_of_rank` says, as a sample
    whose `index` is i.
    """

    def __init__(
        self, rows: MapRows | StreamRows, config: GKDConfig, world_size: int, rank: int, shuffle: bool = True
    ) -> None:
        self._rows, self._shuffle = rows, shuffle
        self._seed = config.seed if config.data_seed is None else config.data_seed
        self._batch, self._world_size, self._rank = config.per_device_train_batch_size, world_size, rank
        self._accumulation = config.accumulation_steps(world_size)
        self.global_batch = config.global_batch(world_size)  # sequences of one optimizer step over all ranks

    @property
    def has_length(self) -> bool:
        """Whether there are epochs: a stream has none."""
        return isinstance(self._rows, MapRows)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, dropped ones not counted; ValueError for a stream."""
        if isinstance(self._rows, StreamRows):
            raise ValueError("a stream has no length: set max_steps")
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one epoch, with their fraction: epochs follow each other within a batch."""
        return self.num_rows / self.global_batch

    def lacks_answers(self, number: int) -> bool:
        """Whether global batch `number` of the order over all rows is not for a step on the dataset, which takes the
        next one of the order over rows with an answer instead. The same on every rank."""
        return self._rows.lacks_answers(number * self.global_batch, self.global_batch, self._seed, self._shuffle)

    def step_batches(self, number: int, answered: bool = False) -> list[list[Sample]]:
        """This rank's micro-batches of global batch `number` (from 0): accumulation lists of B samples.

        With `answered`, the batches are those of the order over rows with an answer.
        """
        first, count = number * self.global_batch, self.global_batch
        sample = self._rows.sampler(first, count, self._seed, self._shuffle, answered)
        return [[sample(i) for i in p] for p in places_of_rank(count, self._rank, self._world_size, self._batch)]


def eval_batches(rows: MapRows, rank: int, world_size: int, batch_size: int) -> list[list[Sample]]:
    """This rank's share of all rows, each used once over all ranks, in batches of at most `batch_size`.

    Every rank gets the same number of batches; the last may be shorter, or empty. A sample's `index` is its row's
    number in the source.
    """
    return [[rows[i] for i in places] for places in places_of_rank(len(rows), rank, world_size, batch_size)]

"""Rows to token ids, each row once: checked and tokenised before a model loads, and kept in an Arrow file.

`RowEncoder` makes an `Outcome` of one row: its token ids, or why it has none. `encode_source` runs it over a whole
source through `datasets.map` over row numbers (rows of different shapes fit no Arrow schema; token ids do), by several
processes, and finds the result of an earlier run by a key of all that it depends on. Knows nothing of ranks or order.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from engine.data.chat import Encoded, encode_conversation, encode_prompt_completion, encode_text, uses_date
from engine.data.messages import MESSAGE_KEYS
from engine.data.rows import Row, parse_row
from engine.data.sources import JsonLines, Source, fingerprint, is_arrow, place_of, read_rows
from engine.data.template import NO_INPUT, TemplateInput, variables_of
from engine.data.tokens import encode_tokens
from engine.data.vocabulary import check_ids

logger = logging.getLogger(__name__)

CACHE_FOLDER = "gkd-engine"  # under HF_DATASETS_CACHE
ROWS_PER_PROCESS = 1000  # fewer are not worth a process
MAX_PROCESSES = 32
BAD, NO_ROOM = -2, -1  # in the column `num_responses`
ROOM = Path(__file__).parent
UNPICKLABLE = "unpicklable"
Format = Callable[[Any], Any]
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")

FEATURES = Features(
    {
        "prompt_ids": ListOf(Value("int32")),
        "input_ids": ListOf(Value("int32")),
        "response_mask": ListOf(Value("bool")),
        "num_responses": Value("int32"),  # response tokens that are predicted; or why there is no sample
        "problem": Value("string"),
        "notes": ListOf(Value("string")),
    }
)


class Outcome(NamedTuple):
    """What became of a row: a sample; neither sample nor problem where `max_length` leaves no room for a token.

    `notes` are sentences for the user, counted over all rows.
    """

    encoded: Encoded | None
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_responses(self) -> int:
        if self.encoded is None:
            return NO_ROOM if self.problem is None else BAD
        return sum(self.encoded.response_mask[1:])  # nothing predicts the first token


@dataclass(frozen=True)
class RowEncoder:
    """Rows to token ids: at most `max_length` in a row, with `template` as every row's input of the chat template.

    Attributes:
        num_embeddings: rows that the models' embeddings share; a token beyond them is a problem of its row.
        formatting_func: makes a row, or its text, of what the source has.
        text_field: column of rows that are one text.
        scores_whole: whether a row without a prompt of its own can be used, every token after its first scored.

    Raises:
        ValueError: for variables in `template` that the chat template never reads.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    template: TemplateInput = NO_INPUT
    num_embeddings: int = sys.maxsize
    formatting_func: Format | None = None
    text_field: str = "text"
    scores_whole: bool = False

    def __post_init__(self) -> None:
        for name in self.template.kwargs:
            if name not in variables_of(self.tokenizer.get_chat_template()):
                raise ValueError(f"chat_template_kwargs has `{name}`, and the chat template has no such variable")

    def outcome(self, raw: Any, place: str, from_arrow: bool = False) -> Outcome:
        """What became of a row, as its source gives it; `problem` does not repeat the place."""
        try:
            if isinstance(raw, ValueError):
                raise raw
            row = parse_row(self.formatted(raw), place, from_arrow, self.text_field)
            notes = Counter(row.notes)
            encoded = self._encode(row, notes)
            if encoded is not None:
                check_ids((*encoded.prompt_ids, *encoded.input_ids), self.num_embeddings, self.tokenizer)
        except (ValueError, RecursionError) as error:
            text = str(error).removeprefix(f"{place}: ")
            return Outcome(None, text.encode(errors="backslashreplace").decode())
        return Outcome(encoded, notes=tuple(notes))

    def formatted(self, raw: Any) -> Any:
        """What `formatting_func` makes of a row; ValueError where it fails, or makes no row."""
        if self.formatting_func is None:
            return raw
        try:
            made = self.formatting_func(copy.deepcopy(raw))
        except Exception as error:  # whatever the script's function raises is a problem of this row
            raise ValueError(f"formatting_func failed on it ({type(error).__name__}: {error})") from error
        if isinstance(made, str):
            return {self.text_field: made}
        if isinstance(made, Mapping):
            return made
        raise ValueError(
            f"formatting_func gave a {type(made).__name__}: it gets one row at a time, and returns a row (a dict with "
            "`messages`, or `prompt` and `completion`) or its text"
        )

    @cached_property
    def formatting_key(self) -> str:
        """A digest of `formatting_func` and what it refers to; where it cannot be told, one that is never met again."""
        if self.formatting_func is None:
            return ""
        try:
            return Hasher.hash(self.formatting_func)
        except Exception as error:  # dill raises what the objects inside do
            logger.warning(
                "formatting_func cannot be pickled (%s): its rows are not cached, and one process works", error
            )
            return f"{UNPICKLABLE} {uuid.uuid4().hex}"

    def _encode(self, row: Row, notes: Counter[str]) -> Encoded | None:
        if row.scored is not None:
            assert row.input_ids is not None
            return encode_tokens(row.input_ids, row.scored, self.max_length)
        if row.input_ids is not None or row.text is not None:
            return self._encode_whole(row)
        if row.messages is None:
            return encode_prompt_completion(self.tokenizer, row.prompt, row.completion, max_length=self.max_length)
        template = self.template
        for key in {key for message in row.messages for key in message} - MESSAGE_KEYS:
            if not re.search(rf"\b{re.escape(key)}\b", self.tokenizer.get_chat_template()):
                notes[f"`{key}` of messages is not read by the chat template"] += 1
        if row.tools or row.template_kwargs:
            text = self.tokenizer.get_chat_template(tools=row.tools)
            if row.tools and "tools" not in variables_of(text):
                raise ValueError("has `tools`, and the chat template writes none: describe them in a system message")
            for name in row.template_kwargs:
                if name not in variables_of(text):
                    notes[f"`{name}` in chat_template_kwargs is not a variable of the chat template"] += 1
            template = replace(template, tools=row.tools, kwargs={**template.kwargs, **row.template_kwargs})
        return encode_conversation(
            self.tokenizer, row.messages, row.responses, max_length=self.max_length, template=template, notes=notes
        )

    def _encode_whole(self, row: Row) -> Encoded | None:
        """A row without a prompt of its own."""
        if not self.scores_whole:
            column = "input_ids" if row.text is None else self.text_field
            raise ValueError(
                f"has `{column}` alone, which does not say where a prompt ends that a student or teacher could answer: "
                "give `messages`, `prompt` and `completion`, or `input_ids` with `labels`; with lmbda=0 and "
                "seq_kd=false, every token of such a row is scored"
            )
        input_ids = row.input_ids if row.text is None else encode_text(self.tokenizer, row.text)
        assert input_ids is not None  # a row has one of the two
        if len(input_ids) < 2:
            raise ValueError("has one token, and the first one is not scored")
        return encode_tokens(input_ids, [True] * len(input_ids), self.max_length)

    def key(self) -> str:
        """A digest of everything beside the rows that token ids depend on."""
        tokenizer, template = self.tokenizer, self.template
        parts = [
            tokenizer.backend_tokenizer.to_str(),
            type(tokenizer).__name__,
            json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str),
            json.dumps([self.max_length, self.num_embeddings, template.tools, template.kwargs], default=str),
            json.dumps([self.formatting_key, self.text_field, self.scores_whole]),
            str(template.now if uses_date(tokenizer) else None),
            *(path.read_text() for path in sorted(ROOM.glob("*.py"))),  # a change in this room makes caches stale
            *(version(name) for name in LIBRARIES),
        ]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(hashlib.blake2b(part.encode(errors="backslashreplace")).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Mapper:
    """The function that `datasets.map` hands to its processes."""

    source: Dataset | JsonLines | list
    name: str
    encoder: RowEncoder

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in FEATURES}
        for outcome in self._outcomes(batch["number"]):
            encoded = outcome.encoded or Encoded([], [], [])
            values = (*encoded, outcome.num_responses, outcome.problem, list(outcome.notes))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return columns

    def _outcomes(self, numbers: list[int]) -> Iterator[Outcome]:
        rows = read_rows(self.source, numbers[0], numbers[-1] + 1)
        for number, raw in zip(numbers, rows, strict=True):
            yield self.encoder.outcome(raw, place_of(self.source, self.name, number), is_arrow(self.source))


def encode_source(
    source: Source, name: str, encoder: RowEncoder, count: int, num_proc: int | None, rows_key: str | None = None
) -> Dataset:
    """The first `count` rows of a source, encoded: one row each, with the columns of `FEATURES`.

    Written below `HF_DATASETS_CACHE`, each file under a temporary name first, so that hosts that share the folder do
    not disturb each other; rows that an earlier run has encoded alike are read from there.

    Args:
        num_proc: processes; None chooses by cores and rows.
        rows_key: the source's `fingerprint`, where it is known.

    Raises:
        ValueError: where the folder cannot be written, or holds a damaged file.
    """
    assert not isinstance(source, IterableDataset)
    rows_key = rows_key or fingerprint(source)
    key = hashlib.blake2b(f"{rows_key} {encoder.key()} {count}".encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER
    numbers = Dataset(pa.table({"number": np.arange(count)}))
    is_picklable = not encoder.formatting_key.startswith(UNPICKLABLE)
    processes = min(count, num_proc or default_processes(source, count)) if is_picklable else 1
    file = folder / f"{key}.arrow"
    if not any(folder.glob(f"{key}*.arrow")):  # each process writes one of its own
        logger.info("%s: checking and tokenising %d rows with %d processes", name, count, processes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return numbers.map(
            _Mapper(source, name, encoder),
            batched=True,
            remove_columns=["number"],
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(file),
            new_fingerprint=key,
            load_from_cache_file=True,
            desc=f"{name}: checking and tokenising",
        )
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{name}: the tokenised rows cannot be kept under {str(folder)!r} ({error}): set HF_DATASETS_CACHE to a "
            f"folder with room, and delete {key}*.arrow where it is damaged"
        ) from error


def default_processes(source: Source, count: int) -> int:
    """A process per core, each with enough rows to be worth it; a list, which would be copied to each, gets one."""
    if isinstance(source, list):
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), MAX_PROCESSES, count // ROWS_PER_PROCESS))

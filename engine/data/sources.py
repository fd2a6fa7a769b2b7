"""Where rows come from: a local file or folder, a hub dataset, a `datasets` object or a list of dicts.

A source is anything with rows in an order. Errors name a row by its place (file and line, or split and row number,
counted from 1). What a row must look like is `engine.data.rows`'s. No tokenizer, no ranks, no collectives here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from engine.config import GKDConfig
from engine.data.messages import MEDIA

logger = logging.getLogger(__name__)

FINGERPRINT_STREAM_ROWS = 16
FINGERPRINT_BLOCK_ROWS = 10_000
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class JsonLines:
    """A JSONL file read by line on demand: rows may differ in shape, and errors name the line.

    Holds 16 bytes per row in memory. Blank lines are no rows.

    Raises:
        ValueError: on access, for a line that is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, lines, position = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(position)
                    lines.append(number)
                position += len(line)
        self._starts = np.array(starts, dtype=np.int64)
        self._lines = np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.read(index, index + 1)
        if isinstance(row, ValueError):
            raise row
        return row

    def read(self, first: int, last: int) -> Iterator[dict[str, Any] | ValueError]:
        """Rows `first` to `last - 1`; in place of a line that is no row, the error that says why."""
        with self.path.open("rb") as file:
            for index in range(first, last):
                file.seek(self._starts[index])
                yield self._parse(file.readline(), index)

    def place(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"

    def _parse(self, line: bytes, index: int) -> dict[str, Any] | ValueError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSON, UTF-8 or nested without end
            return ValueError(f"{self.place(index)}: not valid JSON ({error})")
        if not isinstance(row, dict):
            return ValueError(f"{self.place(index)}: must be a JSON object, is a {type(row).__name__}")
        return row


Source: TypeAlias = Dataset | IterableDataset | JsonLines | list


def load_rows(config: GKDConfig, split: str) -> Source:
    """The rows of `config.dataset_name`: a local file or folder, else a name on the hub.

    A folder is one written by `save_to_disk`, or has `<split>.jsonl`, or data files that `datasets` recognises. A
    single file is the training split and has no other. `dataset_streaming` applies to the training split.

    Raises:
        ValueError: where there is no such dataset, configuration or split, or a file cannot be read.
    """
    name = config.dataset_name
    if name is None:
        raise ValueError("dataset_name is not set: give a hub name, a .jsonl/.json/.parquet file or a folder")
    path, streaming = Path(name), config.dataset_streaming and split == config.dataset_train_split
    if path.is_file():
        if split != config.dataset_train_split:
            raise ValueError(
                f"dataset_name={name!r} is a single file and has only the training split, not {split!r}: give a folder "
                f"with {config.dataset_train_split}.jsonl and {split}.jsonl"
            )
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(f"dataset_name={name!r}: must be a .jsonl, .json or .parquet file, or a folder")
        if path.suffix == ".jsonl":
            return JsonLines(path)
        return open_dataset(name, FILE_BUILDERS[path.suffix], data_files=name, split="train", streaming=streaming)
    if path.is_dir():
        if (path / f"{split}.jsonl").is_file():
            return JsonLines(path / f"{split}.jsonl")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return saved_split(path, split, config.dataset_train_split)
    return open_dataset(name, name, name=config.dataset_config, split=split, streaming=streaming)


def has_split(config: GKDConfig, split: str) -> bool:
    """Whether `load_rows` would find the split, told without reading a row."""
    name = config.dataset_name
    assert name is not None  # `load_rows` has read another split of it
    path = Path(name)
    if path.is_file():
        return split == config.dataset_train_split
    if (path / f"{split}.jsonl").is_file():
        return True
    if (path / "dataset_dict.json").is_file():
        return split in json.loads((path / "dataset_dict.json").read_text())["splits"]
    if (path / "state.json").is_file():
        return split == config.dataset_train_split
    try:
        return split in get_dataset_split_names(name, config.dataset_config)
    except (OSError, ValueError, DatasetsError) as error:  # a hub that is offline, with the rows in the cache
        logger.warning("cannot tell whether %s has a split %r: no evaluation at the end (%s)", name, split, error)
        return False


def saved_split(path: Path, split: str, train_split: str) -> Dataset:
    """A split of a folder that `save_to_disk` wrote; memory-mapped, so streaming would add nothing."""
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"dataset_name={str(path)!r}: the saved dataset cannot be read ({error})") from error
    if isinstance(saved, DatasetDict):
        return pick_split(saved, split, str(path))
    if split != train_split:
        raise ValueError(f"dataset_name={str(path)!r} holds one dataset, the training split; it has no {split!r}")
    return saved


def pick_split(splits: DatasetDict | IterableDatasetDict, split: str, name: str) -> Dataset | IterableDataset:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return splits[split]


def open_dataset(shown_name: str, builder: str, **kwargs: Any) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, whose many errors become one ValueError that names the dataset.

    Safe on several ranks at once: the library builds its cache under a file lock.
    """
    try:
        return load_dataset(builder, **kwargs)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"dataset_name={shown_name!r}, split {kwargs['split']!r} cannot be read ({type(error).__name__}: {error})"
        ) from error


def as_source(data: Any, split: str, name: str) -> Source:
    """A dataset object of the Python API as a source; of a DatasetDict, its split.

    Raises:
        ValueError: for an object of another kind.
    """
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        data = pick_split(data, split, name)
    if isinstance(data, Dataset):
        return data.with_format(None)
    if isinstance(data, (IterableDataset, JsonLines)):
        return data
    if isinstance(data, (list, tuple)):
        return list(data)
    raise ValueError(
        f"{name} must be a datasets.Dataset, an IterableDataset or a list of dicts, is {type(data).__name__}"
    )


def read_rows(source: Dataset | JsonLines | list, first: int, last: int) -> Iterator[Any]:
    """Rows `first` to `last - 1` as they are; in place of one that cannot be read, the ValueError that says why."""
    if isinstance(source, JsonLines):
        yield from source.read(first, last)
    elif isinstance(source, Dataset):
        media = [name for name in source.column_names if name in MEDIA]  # refused, so not worth decoding
        columns = source.remove_columns(media)[first:last]
        columns |= source.select_columns(media).with_format("arrow")[first:last].to_pydict() if media else {}
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    else:
        yield from source[first:last]


def stream_rows(source: Source) -> Iterator[Any]:
    """All rows in order, as `read_rows` gives them, read one by one."""
    return source.read(0, len(source)) if isinstance(source, JsonLines) else iter(source)


def is_arrow(source: Source) -> bool:
    """Whether rows have passed through Arrow, which gives all dicts of a column the keys of each, with nulls."""
    return isinstance(source, (Dataset, IterableDataset))


def keep_columns(source: Source, columns: tuple[str, ...]) -> Source:
    """A dataset without the columns that nobody reads; as it is where it has none of `columns`."""
    if not isinstance(source, Dataset):
        return source
    known = [name for name in source.column_names if name in columns]
    return source.with_format(None).select_columns(known) if known else source.with_format(None)


def fingerprint(source: Source) -> str:
    """A digest of the rows: all bytes of a JSONL file, all values of a list or dataset, the first few of a stream."""
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(source, JsonLines):
        with source.path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    elif isinstance(source, Dataset):
        for table in source.with_format("arrow").iter(FINGERPRINT_BLOCK_ROWS):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            digest.update(sink.getvalue())
    else:
        limit = FINGERPRINT_STREAM_ROWS if isinstance(source, IterableDataset) else None
        for row in islice(source, limit):
            digest.update(repr(row).encode(errors="backslashreplace"))
    return digest.hexdigest()


def place_of(source: Source, name: str, index: int) -> str:
    """How errors name row `index` (from 0) of a source."""
    return source.place(index) if isinstance(source, JsonLines) else f"{name}, row {index + 1}"

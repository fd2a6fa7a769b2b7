"""Where rows come from, and what a row must look like.

A source is anything with rows in an order: a local file or folder, a hub dataset, a `datasets` object or a list of
dicts. `parse_row` turns one of its rows into a `Row` or raises with the place (file and line, or split and row
number, counted from 1). No tokenizer, no ranks, no collectives here.

Three kinds of row: `messages` (role and content of each turn), `prompt` with `completion` (both text, or both lists
of messages), and prompts only (`prompt` alone, or `messages` that end before an answer).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
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

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
FINGERPRINT_ROWS = 1000
FINGERPRINT_STREAM_ROWS = 16
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Row:
    """One checked row: a conversation, or a plain-text prompt with or without its completion.

    Assistant turns before message number `first_response` belong to the prompt.
    """

    place: str
    messages: list[dict[str, Any]] | None = None
    first_response: int = 0
    prompt: str = ""
    completion: str | None = None

    @property
    def has_completion(self) -> bool:
        if self.messages is None:
            return self.completion is not None
        return self.messages[-1]["role"] == "assistant" and len(self.messages) > self.first_response


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
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parse(file.readline(), index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for index, line in enumerate(line for line in file if line.strip()):
                yield self._parse(line, index)

    def place(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"

    def _parse(self, line: bytes, index: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # JSON or UTF-8
            raise ValueError(f"{self.place(index)}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.place(index)}: must be a JSON object, is a {type(row).__name__}")
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


def fingerprint(source: Source) -> str:
    """A digest of the rows: all bytes of a JSONL file, else the number of rows and a thousand of them, spread evenly;
    the first few of a stream."""
    digest = hashlib.blake2b(digest_size=6)
    if isinstance(source, JsonLines):
        with source.path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        return digest.hexdigest()
    if isinstance(source, IterableDataset):
        rows: Iterable[Any] = islice(source, FINGERPRINT_STREAM_ROWS)
    else:
        digest.update(str(len(source)).encode())
        rows = (source[i] for i in range(0, len(source), max(1, len(source) // FINGERPRINT_ROWS)))
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def place_of(source: Source, name: str, index: int) -> str:
    """How errors name row `index` (from 0) of a source."""
    return source.place(index) if isinstance(source, JsonLines) else f"{name}, row {index + 1}"


def parse_row(raw: Any, place: str) -> Row:
    """A checked `Row`.

    Raises:
        ValueError: for a row of another shape; the text starts with `place`.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{place}: a row must be a dict, is a {type(raw).__name__}")
    messages, prompt, completion = raw.get("messages"), raw.get("prompt"), raw.get("completion")
    if raw.get("tools"):
        raise ValueError(f"{place}: `tools` is not supported: describe the tools in a system message")
    if messages is not None and prompt is not None:
        raise ValueError(f"{place}: has both `messages` and `prompt`: keep one")
    if messages is not None:
        return Row(place, messages=check_messages(messages, place, "messages"))
    if prompt is None:
        columns = ", ".join(map(str, raw)) or "none"
        raise ValueError(
            f"{place}: needs `messages`, or `prompt` and `completion`, or `prompt`; its columns: {columns}"
        )
    if isinstance(prompt, str):
        check_text(prompt, f"{place}: prompt")
        if completion is not None:
            check_text(completion, f"{place}: completion")
        return Row(place, prompt=prompt, completion=completion)
    turns = check_messages(prompt, place, "prompt")
    if completion is None:
        return Row(place, messages=turns, first_response=len(turns))
    answer = check_messages(completion, place, "completion", turns)
    if answer[-1]["role"] != "assistant":
        raise ValueError(f"{place}: completion must end in an assistant turn, ends in {answer[-1]['role']!r}")
    return Row(place, messages=turns + answer, first_response=len(turns))


def check_messages(messages: Any, place: str, column: str, before: list[dict] | None = None) -> list[dict[str, Any]]:
    """The messages as plain dicts without empty keys; `before` are those that precede them."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{place}: `{column}` must be a list of messages with at least one, is {messages!r:.80}")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}: {column} {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be a dict with `role` and `content`, is {message!r:.80}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has role {role!r}: must be one of {', '.join(ROLES)}")
        kept = {key: value for key, value in message.items() if value is not None}
        if role == "assistant" and kept.get("tool_calls"):
            kept.setdefault("content", "")
        else:
            check_text(kept.get("content"), f"{where} ({role}): content")
        checked.append(kept)
    if before is None and checked[0]["role"] == "assistant":
        raise ValueError(f"{place}: `{column}` starts with an assistant turn, which nothing asks for")
    if before is None and checked[-1]["role"] == "system":
        raise ValueError(f"{place}: `{column}` has no user turn after the last system message, so nothing to answer")
    return checked


def check_text(value: Any, what: str) -> None:
    if value is None:
        raise ValueError(f"{what} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, is a {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{what} is empty")

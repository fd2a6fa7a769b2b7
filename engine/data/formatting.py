"""A function of the user's that makes a row of what a dataset has, applied to every row before the engine reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

Format = Callable[[Any], Any]


def formatted(data: Any, function: Format) -> Any:
    """The dataset with `function(row)` in place of each row; of several datasets, each of them.

    Raises:
        ValueError: where the function returns no row; of a stream, when that row is read.
    """
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        return type(data)({name: formatted(one, function) for name, one in data.items()})
    if isinstance(data, dict):
        return {name: formatted(one, function) for name, one in data.items()}
    if isinstance(data, (Dataset, IterableDataset)):
        return data.map(lambda row: checked(function(row)), remove_columns=data.column_names)
    return [checked(function(row)) for row in data]


def checked(row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise ValueError(
        f"formatting_func returned {type(row).__name__}, and a row is a dict: return {{'messages': [...]}} or "
        "{'prompt': ..., 'completion': ...}, so that it is known what the student is to write"
    )

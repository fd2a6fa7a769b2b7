"""Rows of a dataset, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def talk(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant by turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def dialogues(count: int) -> list[dict]:
    return [{"messages": talk(f"question {i}", f"answer {i}")} for i in range(count)]


def write_jsonl(path: Path, rows: Iterable[dict | str]) -> str:
    """Write one line per row; a text is written as it is. Returns the path for `dataset_name`."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)

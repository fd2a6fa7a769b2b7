"""Rows that are tokenised already: `input_ids`, with `labels` or a mask that says which of them are scored.

The names are those of transformers' and TRL's data: labels of -100 are not scored, nor is what `completion_mask` or
`assistant_masks` has 0 for. No tokenizer, no template here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.data.chat import Encoded

IGNORED = -100
MASKS = ("completion_mask", "assistant_masks")
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", *MASKS)


def read_tokens(raw: Mapping[str, Any], place: str) -> tuple[list[int], list[bool] | None]:
    """The row's token ids without padding, and which of them are scored; None where the row does not say.

    Raises:
        ValueError: for columns that are no lists of whole numbers, differ in length or contradict each other.
    """
    columns = {name: raw[name] for name in TOKEN_COLUMNS if raw.get(name) is not None}
    columns = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in columns.items()}
    input_ids = columns["input_ids"]
    for name, values in columns.items():
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"{place}: `{name}` must be a list of whole numbers, is {values!r:.80}")
        if len(values) != len(input_ids):
            raise ValueError(
                f"{place}: `{name}` has {len(values)} entries and `input_ids` {len(input_ids)}: they must be as many"
            )
        if name in (*MASKS, "attention_mask") and not set(values) <= {0, 1}:
            raise ValueError(f"{place}: `{name}` must hold 0 and 1 alone, is {values!r:.80}")
    said = [[value == 1 for value in columns[name]] for name in MASKS if name in columns]
    if "labels" in columns:
        pairs = list(zip(columns["labels"], input_ids, strict=True))
        if any(label not in (IGNORED, token) for label, token in pairs):
            raise ValueError(
                f"{place}: `labels` must repeat `input_ids` or be {IGNORED}, position by position: the engine shifts "
                "them itself"
            )
        said.append([label != IGNORED for label, _ in pairs])
    scored = [all(here) for here in zip(*said, strict=True)] if said else None  # a token counts where all say so
    live = columns.get("attention_mask", [1] * len(input_ids))
    first, last = live.index(1) if 1 in live else 0, len(live) - live[::-1].index(1) if 1 in live else 0
    if 0 in live[first:last]:
        raise ValueError(f"{place}: `attention_mask` has a 0 between two tokens; padding stands at the ends alone")
    if first == last:
        raise ValueError(f"{place}: `input_ids` has no token")
    if any(token < 0 for token in input_ids[first:last]):
        raise ValueError(f"{place}: `input_ids` has a negative number: {min(input_ids[first:last])}")
    return list(input_ids[first:last]), None if scored is None else scored[first:last]


def encode_tokens(input_ids: list[int], scored: list[bool], max_length: int | None) -> Encoded | None:
    """Token ids with the scored ones as response, cut at `max_length`.

    A rollout's prompt is what precedes the last run of scored tokens, which is the last answer of a conversation; of a
    row that is scored from its first token on, that token. Without a scored token the row is a prompt.

    Returns:
        None where `max_length` leaves no room for a scored token, or behind a prompt.
    """
    if not any(scored):
        has_room = max_length is None or len(input_ids) < max_length
        return Encoded(input_ids, list(input_ids), [False] * len(input_ids)) if has_room else None
    kept = [False, *scored[1:max_length]]  # nothing predicts the first token
    if not any(kept):
        return None
    start = len(kept) - 1 - kept[::-1].index(True)
    while kept[start - 1]:
        start -= 1
    return Encoded(input_ids[:start], input_ids[: len(kept)], kept)

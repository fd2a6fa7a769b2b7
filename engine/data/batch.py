"""Typed batches.

A `Sample` is one sequence on the host; a `PackedBatch` is a micro-batch on the device, packed without
padding. Nothing here knows of models, ranks or losses.

Shapes: B sequences, T packed positions (sum of the lengths), N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Sample:
    """One sequence: `input_ids` with the response tokens marked, and the prompt that a rollout starts from.

    A prompts-only row has `input_ids == prompt_ids` and no response token.

    Attributes:
        num_references: response tokens that the row's own answer had, where another one has taken its place.
    """

    prompt_ids: list[int]
    input_ids: list[int]
    response_mask: list[bool]
    index: int
    num_references: int | None = None

    @property
    def num_response_tokens(self) -> int:
        return sum(self.response_mask[1:])  # nothing predicts the first token

    def with_response(self, token_ids: list[int], index: int | None = None) -> Sample:
        """The prompt with this response, all of it marked; under another `index` where one is given."""
        return replace(
            self,
            input_ids=self.prompt_ids + token_ids,
            response_mask=[False] * len(self.prompt_ids) + [True] * len(token_ids),
            index=self.index if index is None else index,
            num_references=self.num_response_tokens if self.num_references is None else self.num_references,
        )


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, packed: no padding, position ids restart at each sequence.

    Attributes:
        num_sequences: B.
        num_references: response tokens of the dataset's answers, also where others have taken their place.
        index_B, length_B: `index` and number of tokens of each sample, on the host.
        input_ids_T, position_ids_T: int64 [T].
        predictor_N: int64 [N], packed positions whose hidden state predicts a response token.
        target_ids_N: int64 [N], the response tokens.
        sequence_N: int64 [N], the sequence that each response token belongs to, in 0..B-1.
        offset_N: int64 [N], place of each response token among those of its sequence.
    """

    num_sequences: int
    num_references: int
    index_B: tuple[int, ...]
    length_B: tuple[int, ...]
    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predictor_N: torch.Tensor
    target_ids_N: torch.Tensor
    sequence_N: torch.Tensor
    offset_N: torch.Tensor

    @property
    def num_response_tokens(self) -> int:
        return self.target_ids_N.numel()


def pack(samples: list[Sample], device: torch.device | str) -> PackedBatch:
    """Concatenate samples into one row of positions.

    Raises:
        ValueError: for an empty list, or a sample without tokens.
    """
    if not samples or any(not sample.input_ids for sample in samples):
        raise ValueError("pack: needs at least one sample, each with at least one token")
    columns: list[list[int]] = [[] for _ in range(6)]  # in the order of PackedBatch
    input_ids, position_ids, predictors, targets, sequences, offsets = columns
    for row, sample in enumerate(samples):
        start = len(input_ids)
        response = [i for i in range(1, len(sample.input_ids)) if sample.response_mask[i]]
        input_ids += sample.input_ids
        position_ids += range(len(sample.input_ids))
        predictors += [start + i - 1 for i in response]
        targets += [sample.input_ids[i] for i in response]
        sequences += [row] * len(response)
        offsets += range(len(response))
    references = [s.num_response_tokens if s.num_references is None else s.num_references for s in samples]
    tensors = (torch.tensor(column, dtype=torch.long, device=device) for column in columns)
    index_B, length_B = tuple(s.index for s in samples), tuple(len(s.input_ids) for s in samples)
    return PackedBatch(len(samples), sum(references), index_B, length_B, *tensors)

"""Steps that went wrong: loss or gradient not finite. Counted, written down with their samples, and at last fatal.

The update itself is dropped by `Student.step`. Also the rows in which samples are shown, here and in the tracker.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from engine.checkpoint.checkpoint import TrainState
from engine.cluster.collectives import gather_counts
from engine.config import GKDConfig
from engine.data.batch import PackedBatch, Sample
from engine.errors import BadStepsError
from engine.loss.values import TokenValues

logger = logging.getLogger(__name__)


def sample_rows(
    tokenizer: PreTrainedTokenizerBase,
    samples: list[list[Sample]],
    batches: list[PackedBatch],
    values: list[TokenValues],
) -> list[tuple[Sample, str, str, float | None]]:
    """Sample, prompt, response and mean divergence (None without a response) of this rank's samples."""
    rows = []
    for batch, packed, token_values in zip(samples, batches, values, strict=True):
        for place, sample in enumerate(batch):
            own = token_values.divergence[packed.sequence_N == place]
            response = tokenizer.decode(sample.input_ids[len(sample.prompt_ids) :])
            mean = own.mean().item() if own.numel() else None
            rows.append((sample, tokenizer.decode(sample.prompt_ids), response, mean))
    return rows


class BadSteps:
    """Counts in the run's state, and writes `bad_steps/step_<N>_rank_<R>.jsonl` into the run folder."""

    def __init__(self, config: GKDConfig, tokenizer: PreTrainedTokenizerBase, rank: int, device: torch.device) -> None:
        self.limit, self.folder = config.max_bad_steps, Path(config.output_dir) / "bad_steps"
        self.tokenizer, self.rank, self.device = tokenizer, rank, device

    def record(
        self,
        state: TrainState,
        was_applied: bool,
        samples: list[list[Sample]],
        batches: list[PackedBatch],
        values: list[TokenValues],
    ) -> None:
        """Take note of a step. `was_applied` is the same on all ranks, and all ranks must call.

        Raises:
            BadStepsError: on all ranks, after `max_bad_steps` in a row.
        """
        if was_applied:
            state.bad_steps_in_a_row = 0
            return
        state.bad_steps += 1
        state.bad_steps_in_a_row += 1
        is_finite = all(token_values.is_finite for token_values in values)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"step_{state.step}_rank_{self.rank}.jsonl", "w", encoding="utf-8") as file:
            for sample, prompt, response, mean in sample_rows(self.tokenizer, samples, batches, values):
                shown = mean if mean is not None and math.isfinite(mean) else None
                row = {"index": sample.index, "prompt": prompt, "sample": response, "mean_divergence": shown}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        counts = gather_counts([int(not is_finite)], self.device)[:, 0].tolist()
        ranks = ", ".join(str(rank) for rank, is_bad in enumerate(counts) if is_bad)
        cause = f"the loss on rank {ranks}" if ranks else "the gradient (every rank's loss is finite)"
        text = f"step {state.step}: {cause} is not finite, the update is dropped; samples in {self.folder}"
        if state.bad_steps_in_a_row >= self.limit:
            raise BadStepsError(f"{text}. {self.limit} such steps in a row (max_bad_steps), weights as before them")
        if self.rank == 0:
            logger.warning("%s", text)

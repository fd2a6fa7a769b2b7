"""Checkpoints: DeepSpeed's own format, visible only when complete, with a manifest that tells.

A checkpoint is written into a hidden folder, every rank's files are flushed and hashed, the manifest is written last,
the folder is renamed, and only then does `latest` move and an old checkpoint go. A crash at any instant leaves the
newest complete one loadable. An error on one rank becomes an error on all of them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from engine.checkpoint.changes import optimizer_name
from engine.checkpoint.elastic import (
    UNIVERSAL_TAG,
    remove_universal_copies,
    rollouts_of_rank,
    universal_copy,
    zero_layout,
)
from engine.checkpoint.manifest import (
    MANIFEST,
    flushed_digests,
    list_files,
    publish,
    read_manifest,
    share,
    write_durably,
)
from engine.checkpoint.parts import save_parts
from engine.checkpoint.resumption import Resumption, saved_checkpoints
from engine.checkpoint.run_folder import CHECKPOINTS
from engine.cluster.agreement import all_or_none, union
from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.errors import CheckpointError
from engine.zero import partitions

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps; all that a resume needs beside weights and optimizer.

    Attributes:
        batches: global batches taken from the data so far; the next one has this number.
        answered_batches: those taken from the order over rows with an answer, where it is another.
        started: date of the run's first start, which a chat template may write; ISO.
        tokens: response tokens trained on so far, over all ranks.
        run_id: the tracker's id of the run.
        bad_steps: steps whose update was dropped, as loss or gradient was not finite.
        bad_steps_in_a_row: those of them since the last good step.
    """

    step: int = 0
    batches: int = 0
    answered_batches: int = 0
    started: str | None = None
    tokens: int = 0
    run_id: str | None = None
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0


class Checkpoints:
    """The checkpoints of one run folder. All ranks must call its methods."""

    def __init__(self, config: GKDConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / CHECKPOINTS
        self.data: dict[str, Any] = {}  # the run's rows: see `changes.compare_rows`
        self.optimizer_name = optimizer_name(config)
        self.saved_step: int | None = None  # of the newest checkpoint that this process wrote or resumed from

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        state: TrainState,
        model_parts: list[Any],
        rollouts: list[list[Sample]] | None,
    ) -> Path | None:
        """Write `step_<N>`. `model_parts` (config, tokenizer: whatever has `save_pretrained`) go into its `hf` folder,
        rollouts that later steps still train on into one file per rank.

        None where it could not be written and `save_on_error` is `warn`.

        Raises:
            CheckpointError: where it could not be written; what was written is removed, earlier ones are intact.
        """
        hidden = self.folder / f".saving_step_{state.step}"
        try:
            path = self._write(hidden, engine, state, model_parts, rollouts)
        except CheckpointError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
            dist.barrier()
            if self.config.save_on_error == "raise":
                raise
            if dist.get_rank() == 0:
                logger.error("%s. Training goes on (save_on_error: warn)", error)
            return None
        self.saved_step = state.step
        return path

    def _write(
        self,
        hidden: Path,
        engine: deepspeed.DeepSpeedEngine,
        state: TrainState,
        model_parts: list[Any],
        rollouts: list[list[Sample]] | None,
    ) -> Path:
        name = f"step_{state.step}"
        record = self._record(state)
        is_main = dist.get_rank() == 0

        def prepare() -> None:
            for stale in [*self.folder.glob(".saving_*"), *self.folder.glob(".replaced_*")] if is_main else []:
                shutil.rmtree(stale)
            if is_main:
                (hidden / "hf").mkdir(parents=True)
                save_parts(model_parts, hidden / "hf")

        def write() -> None:
            partitions.save_checkpoint(engine, hidden, {"train_state": record})
            if rollouts is not None:
                rows = [[dataclasses.asdict(sample) for sample in batch] for batch in rollouts]
                (hidden / f"rollouts_{dist.get_rank()}.json").write_text(json.dumps(rows))

        def reveal() -> None:
            if is_main:
                write_durably(hidden / MANIFEST, json.dumps({**record, "files": digests}, indent=1, default=str))
                publish(hidden, self.folder / name)
                write_durably(self.folder / "latest", name)
                remove_universal_copies(self.folder)
                self._prune(keep=name)

        def flush() -> dict[str, list]:
            return flushed_digests(hidden, share(list_files(hidden)))

        self._together(f"{name}: cannot be begun", prepare)
        self._together(f"{name}: cannot be written", write)
        digests = union(self._together(f"{name}: cannot be flushed", flush))
        self._together(f"{name}: cannot be completed", reveal)
        return self.folder / name

    def _together(self, what: str, action: Callable[[], Any]) -> Any:
        return all_or_none(f"checkpoint {what}", Path(self.config.output_dir), action)

    def _record(self, state: TrainState) -> dict[str, Any]:
        config, world_size = self.config, dist.get_world_size()
        return dataclasses.asdict(state) | {
            "layout": zero_layout(config, world_size),
            "global_batch_size": config.global_batch(world_size),
            "saved_at": time.time(),
            "data": self.data,
            "optimizer": self.optimizer_name,
            "config": config.to_dict(),
        }

    def _prune(self, keep: str) -> None:
        if self.config.save_total_limit is None:
            return
        complete = [path for path in saved_checkpoints(self.folder) if read_manifest(path) is not None]
        for old in complete[self.config.save_total_limit :]:
            if old.name != keep:
                shutil.rmtree(old)

    def load(self, found: Resumption, engine: deepspeed.DeepSpeedEngine) -> TrainState:
        """Weights, optimizer and schedule into the engine, which must be freshly built.

        Raises:
            ValueError, CheckpointError: as `universal_copy`, which is used where another layout wrote it.
        """
        path, manifest, layout = found.path, found.manifest, zero_layout(self.config, dist.get_world_size())
        if {"bf16": manifest["config"]["bf16"], **manifest["layout"]} == layout:
            client_state = partitions.load_checkpoint(engine, path)
        else:
            copy = universal_copy(path, manifest, layout, self.folder)
            client_state = partitions.load_universal_checkpoint(engine, copy / UNIVERSAL_TAG)
        record = client_state["train_state"]
        self.saved_step = record["step"]
        if found.begins_data_anew:
            record["batches"] = record["answered_batches"] = 0
        return TrainState(**{f.name: record[f.name] for f in dataclasses.fields(TrainState) if f.name in record})

    def load_rollouts(self, found: Resumption) -> list[list[Sample]] | None:
        """This rank's rollouts, where the checkpoint fell between two steps that share them and still are to."""
        saved = found.manifest["config"]
        if any(saved.get(name) != getattr(self.config, name) for name in ("rollout_reuse", "num_generations")):
            return None
        return rollouts_of_rank(found.path, self.config, dist.get_rank(), dist.get_world_size())

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from transformers import TrainerState

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

TRAINER_STATE = "trainer_state.json"  # transformers' name


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
        loss_sum, loss_steps: finite losses of the steps since the last log, and their number.
        owes_evaluation: whether the evaluation of this step is due, and a signal came before it.
        best_metric, best_step: the best of all evaluations, and its step; None before the first.
        best_checkpoint_metric, best_checkpoint: the same of the steps that have a checkpoint.
    """

    step: int = 0
    batches: int = 0
    answered_batches: int = 0
    started: str | None = None
    tokens: int = 0
    run_id: str | None = None
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    owes_evaluation: bool = False
    best_metric: float | None = None
    best_step: int | None = None
    best_checkpoint_metric: float | None = None
    best_checkpoint: int | None = None


def metric_of(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a configuration takes for better."""
    return fields.get("metric_for_best_model"), fields.get("greater_is_better")


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
        trainer_state: TrainerState,
        write_model: Callable[[Path], None],
    ) -> Path | None:
        """Write `step_<N>`. `model_parts` (config, tokenizer: whatever has `save_pretrained`) go into its `hf` folder,
        rollouts that later steps still train on into one file per rank, transformers' state into `trainer_state.json`.
        With `save_only_model` it is what `write_model` writes on all ranks, and nothing can be resumed from it.

        None where it could not be written and `save_on_error` is `warn`.

        Raises:
            CheckpointError: where it could not be written; what was written is removed, earlier ones are intact.
        """
        hidden = self.folder / f".saving_step_{state.step}"
        try:
            path = self._write(hidden, engine, state, model_parts, rollouts, trainer_state, write_model)
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
        trainer_state: TrainerState,
        write_model: Callable[[Path], None],
    ) -> Path:
        name = f"step_{state.step}"
        record = self._record(state)
        is_main = dist.get_rank() == 0

        def prepare() -> None:
            for stale in [*self.folder.glob(".saving_*"), *self.folder.glob(".replaced_*")] if is_main else []:
                shutil.rmtree(stale)
            if is_main:
                hidden.mkdir(parents=True)
                if not self.config.save_only_model:
                    (hidden / "hf").mkdir()
                    save_parts(model_parts, hidden / "hf")
                trainer_state.save_to_json(str(hidden / TRAINER_STATE))

        def write() -> None:
            if self.config.save_only_model:
                write_model(hidden)
                return
            partitions.save_checkpoint(engine, hidden)
            if rollouts is not None:
                rows = [[dataclasses.asdict(sample) for sample in batch] for batch in rollouts]
                (hidden / f"rollouts_{dist.get_rank()}.json").write_text(json.dumps(rows))

        def reveal() -> None:
            if is_main:
                write_durably(hidden / MANIFEST, json.dumps({**record, "files": digests}, indent=1, default=str))
                publish(hidden, self.folder / name)
                write_durably(self.folder / "latest", name)
                remove_universal_copies(self.folder)
                self._prune({name, f"step_{state.best_checkpoint}"})

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
            "only_model": config.save_only_model,
            "data": self.data,
            "optimizer": self.optimizer_name,
            "config": config.to_dict(),
        }

    def note_best(self, state: TrainState) -> None:
        """Write into the checkpoint of this step that it is the best, which it was not known to be when written."""

        def write() -> None:
            if dist.get_rank() == 0:
                path = self.folder / f"step_{state.step}" / MANIFEST
                manifest = json.loads(path.read_text()) | dataclasses.asdict(state)
                write_durably(path, json.dumps(manifest, indent=1, default=str))

        self._together(f"step_{state.step}: cannot be marked as the best", write)

    def _prune(self, keep: set[str]) -> None:
        if self.config.save_total_limit is None:
            return
        complete = [path for path in saved_checkpoints(self.folder) if read_manifest(path) is not None]
        for old in complete[self.config.save_total_limit :]:
            if old.name not in keep:
                shutil.rmtree(old)

    def load(self, found: Resumption, engine: deepspeed.DeepSpeedEngine) -> TrainState:
        """Weights, optimizer and schedule into the engine, which must be freshly built.

        Raises:
            ValueError, CheckpointError: as `universal_copy`, which is used where another layout wrote it.
        """
        manifest = found.manifest
        self.load_weights(found.path, engine)
        self.saved_step = manifest["step"]
        state = TrainState(**{f.name: manifest[f.name] for f in dataclasses.fields(TrainState) if f.name in manifest})
        if found.begins_data_anew:
            state.batches = state.answered_batches = 0
        if metric_of(manifest["config"]) != metric_of(self.config.to_dict()):
            state.best_metric = state.best_step = None
            state.best_checkpoint_metric = state.best_checkpoint = None
        best = state.best_checkpoint
        if best is not None and read_manifest(self.folder / f"step_{best}") is None:
            if dist.get_rank() == 0:
                logger.warning(
                    "%s has no step_%d, the best checkpoint so far: the best to come counts", self.folder, best
                )
            state.best_checkpoint_metric = state.best_checkpoint = None
        return state

    def load_weights(self, path: Path, engine: deepspeed.DeepSpeedEngine) -> None:
        """Weights, optimizer and schedule of a checkpoint into the engine. Raises as `load`."""
        manifest = read_manifest(path)
        if manifest is None:
            raise CheckpointError(f"{path} is not a complete checkpoint")
        layout = zero_layout(self.config, dist.get_world_size())
        if {"bf16": manifest["config"]["bf16"], **manifest["layout"]} == layout:
            partitions.load_checkpoint(engine, path)
        else:
            copy = universal_copy(path, manifest, layout, self.folder)
            partitions.load_universal_checkpoint(engine, copy / UNIVERSAL_TAG)

    def load_rollouts(self, found: Resumption) -> list[list[Sample]] | None:
        """This rank's rollouts, where the checkpoint fell between two steps that share them and still are to."""
        saved = found.manifest["config"]
        if any(saved.get(name) != getattr(self.config, name) for name in ("rollout_reuse", "num_generations")):
            return None
        return rollouts_of_rank(found.path, self.config, dist.get_rank(), dist.get_world_size())

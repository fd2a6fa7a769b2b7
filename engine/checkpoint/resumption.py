"""Resuming: which checkpoint a run goes on from, whether it may, and what it must keep of it.

Knows configurations, rows by their record and the files of checkpoints; writes nothing, and leaves the configuration
as it is. All ranks must call what is public here, except where it only reads manifests.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint.changes import REMEDY, Changes, compare_fields, compare_rows
from engine.checkpoint.elastic import batch_to_keep
from engine.checkpoint.manifest import MANIFEST, holds_only_model, read_manifest, verify
from engine.checkpoint.run_folder import CHECKPOINTS
from engine.config import GKDConfig

logger = logging.getLogger(__name__)

ONLY_MODEL = "it holds the model alone (save_only_model): name it as model_name_or_path of a new run"


@dataclass
class Resumption:
    """A verified checkpoint to go on from.

    Attributes:
        global_batch_size: what the configuration must take over to keep the steps as large as they were; None where
            it gives that already.
        begins_data_anew: whether the position in the rows means nothing any more, which the run has been allowed.
    """

    path: Path
    manifest: dict[str, Any]
    global_batch_size: int | None = None
    begins_data_anew: bool = False

    @property
    def started(self) -> str | None:
        """The date on which the run first started; None where the checkpoint does not say."""
        return self.manifest.get("started")

    def accept(self, config: GKDConfig, changes: Changes) -> None:
        """Say what changed; raise ValueError where the data's position is lost and the run may not begin it anew."""
        if changes.order and not config.allow_data_change:
            raise ValueError(f"{self.path}: {'; '.join(changes.order)}")
        self.begins_data_anew |= bool(changes.order)
        for text in [*changes.said, *(text.replace(REMEDY, "The data begins anew") for text in changes.order)]:
            if dist.get_rank() == 0:
                logger.warning("%s: %s", self.path.name, text)


def find_resumption(config: GKDConfig, optimizer_now: str) -> Resumption | None:
    """The checkpoint that `resume_from_checkpoint` asks for, verified; None for a fresh start.

    Fields that differ from the checkpoint's are named. `optimizer_now` is as `changes.optimizer_name` calls it.

    Raises:
        ValueError: where the named one is missing or damaged (the text names the files), or its global batch,
            order of rows or optimizer cannot be kept.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "auto":
        path = newest_good(Path(config.output_dir) / CHECKPOINTS)
        if path is None:
            return None
    else:
        path = Path(wanted)
        problems = verify(path)
        if problems:
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {'; '.join(problems)}")
        if holds_only_model(path):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {ONLY_MODEL}")
    manifest = read_manifest(path)
    assert manifest is not None  # it is verified
    found = Resumption(path, manifest, batch_to_keep(config, path, manifest, dist.get_world_size()))
    found.accept(config, compare_fields(manifest["config"], config))
    before = manifest.get("optimizer")
    if before not in (None, optimizer_now):
        raise ValueError(
            f"{path} holds the moments of {before}, and the optimizer is now {optimizer_now}: take it back"
        )
    return found


def check_inputs(found: Resumption, config: GKDConfig, data: dict[str, Any], num_steps: int) -> None:
    """Compare the run's rows, as `changes.compare_rows` takes them, and its length with the checkpoint's.

    Raises:
        ValueError: where the position in the rows would be lost, or the run is shorter than the checkpoint.
    """
    found.accept(config, compare_rows(found.manifest.get("data", {}), data))
    step = found.manifest["step"]
    if num_steps < step:
        by_epochs = f"num_train_epochs={config.num_train_epochs} with its {num_steps} steps"
        length = f"max_steps={num_steps}" if config.max_steps > 0 else by_epochs
        raise ValueError(
            f"{length} ends before step {step} of {found.path}: raise it, or resume from an earlier checkpoint"
        )
    if num_steps == step and dist.get_rank() == 0:
        logger.info("step %d of %d is the last: evaluation and export are what is left", step, num_steps)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint without a problem; says which are passed over, and why."""
    is_main = dist.get_rank() == 0
    pointer = folder / "latest"
    if is_main and pointer.is_file():
        named = pointer.read_text().strip()
        if not (folder / named / MANIFEST).is_file():
            logger.warning("%s names %r, which is not a complete checkpoint", pointer, named)
    found = saved_checkpoints(folder)
    dist.barrier()  # every rank has the same list: none writes before all have read
    for path in found:
        problems = verify(path) or ([ONLY_MODEL] if holds_only_model(path) else [])
        if not problems:
            if is_main:
                logger.info("resuming from %s", path)
            return path
        if is_main:
            logger.warning("checkpoint %s is skipped: %s", path, "; ".join(problems))
    if is_main:
        logger.info("no complete checkpoint under %s: a fresh start", folder)
    return None


def saved_checkpoints(folder: Path) -> list[Path]:
    """Folders `step_<N>`, the last written first. Those without a readable manifest, whose age is unknown, lead."""

    def age(path: Path) -> tuple[float, int]:
        manifest = read_manifest(path)
        return (math.inf if manifest is None else manifest.get("saved_at", 0.0), int(path.name[5:]))

    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit()), key=age, reverse=True)

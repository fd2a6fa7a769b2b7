"""What leaves a run: exports of the student with their model card, and pushes of them to the hub.

All ranks call `export` and what pushes; that only rank 0 talks to the hub is the hub's own affair.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from engine.assembly import Run
from engine.cluster.agreement import all_or_none
from engine.errors import CheckpointError
from engine.models.export import export_student, move_model
from engine.publish.card import Origin, ReadMe, build_card, is_of_a_user
from engine.tracking.tracker import package_versions

logger = logging.getLogger(__name__)

SAVING = ".saving_model"  # in a folder that a model is saved into
WAITING = ".hub_step_"  # in the run folder: exports on their way to the hub


class Publication:
    """Exports of one run. `figures` are the newest metrics, which the model card shows."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.figures: dict[str, Any] = {}
        self.num_steps = 0
        if run.rank == 0:  # what a killed run has left
            for folder in Path(run.config.output_dir).glob(f"{WAITING}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take figures of `step`; those of an earlier evaluation stay."""
        self.num_steps = step
        self.figures |= metrics

    def card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> ReadMe:
        """The model card as things stand."""
        run, config = self.run, self.run.config
        student, teacher = run.student.model.config, run.teacher.model.config
        origin = Origin(
            config.model_name_or_path or student.name_or_path,
            config.teacher_model_name_or_path or teacher.name_or_path,
            dataset_name or config.dataset_name,
            self.num_steps,
            config.global_batch(run.world_size),
        )
        return ReadMe(build_card(config, origin, self.figures, package_versions(), model_name, tags))

    def export(self, out: Path) -> None:
        """Write the student as it is now, with its card; a user's own in its place stays. All ranks must call.

        Raises:
            CheckpointError: where it cannot be written.
        """
        self._export(out, is_of_a_user(out / "README.md"))

    def _export(self, out: Path, has_card: bool) -> None:
        card = [] if has_card else [self.card()]
        export_student(self.run.student.model, [*self.run.parts, *card], out)

    def save(self, folder: Path) -> None:
        """`export` into a folder that holds other things, such as checkpoints: file by file. All ranks must call.

        Raises:
            CheckpointError: where it cannot be written.
        """
        hidden = folder / SAVING
        self._export(hidden, is_of_a_user(folder / "README.md"))
        all_or_none(
            f"{folder} cannot be written", folder, lambda: move_model(hidden, folder) if self.run.rank == 0 else None
        )

    def push_checkpoint(self, step: int) -> bool:
        """Begin to push the student as it is at a checkpoint, where that is asked for. All ranks must call.

        Returns whether it did.
        """
        if not self.run.hub.takes_checkpoint():
            return False
        folder = Path(self.run.config.output_dir) / f"{WAITING}{step}"
        try:
            self.export(folder)
        except CheckpointError as error:
            logger.warning("step %d is not pushed to the hub: %s", step, error)
            return False
        self.run.hub.push(folder, f"Training in progress, step {step}", is_temporary=True)
        return True

    def push(
        self, folder: Path, message: str, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> Future[Any] | Any | None:
        """Push a folder; the commit (None where it failed), or its future where nobody waits. All ranks must call."""
        future = self.run.hub.push(folder, message, token, revision)
        return self.run.hub.finish() if blocking else future

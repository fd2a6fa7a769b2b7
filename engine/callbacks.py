"""Callbacks: transformers' own events, state and control, at the moments of this loop.

The flow that the configuration asks for (when to log, evaluate and save) is the first of the callbacks, so that what it
says and what a callback wishes take one way. No collectives: a wish is this rank's, and `Watch.agree` makes it
everyone's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import speed_metrics

from engine.assembly import Run
from engine.checkpoint.checkpoint import TRAINER_STATE, TrainState
from engine.cluster import hosts
from engine.cluster.signals import Wishes
from engine.config import GKDConfig

logger = logging.getLogger(__name__)

# DeepSpeed clips, steps and clears the gradients in one call, and runs the micro-batches as one step.
NEVER_CALLED = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")
ADDS_NO_METRICS = (EarlyStoppingCallback, ProgressCallback, PrinterCallback, DefaultFlowCallback)


def check_callback(callback: Any, config: GKDConfig) -> Any:
    """The callback, a `TrainerCallback` or a class of one.

    Raises:
        ValueError: where it is another thing, or needs what the configuration does not say.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, TrainerCallback):
        raise ValueError(f"callbacks: {callback!r} is no transformers.TrainerCallback, nor a class of one")
    if issubclass(kind, EarlyStoppingCallback):
        if config.metric_for_best_model is None or config.eval_strategy == "no":
            raise ValueError(
                f"callbacks: {kind.__name__} stops by evaluations while training: set eval_strategy to steps or epoch, "
                "and metric_for_best_model (`loss`, or load_best_model_at_end, which takes it)"
            )
    elif issubclass(kind, DefaultFlowCallback):
        raise ValueError(
            f"callbacks: {kind.__name__} is not needed: logging_steps, eval_steps and save_steps of GKDConfig set when"
            " a step is logged, evaluated and saved"
        )
    for name in NEVER_CALLED:
        if getattr(kind, name) is not getattr(TrainerCallback, name):
            logger.warning("%s.%s is never called: DeepSpeed's step has no such moment", kind.__name__, name)
    return callback


class Flow(DefaultFlowCallback):
    """transformers' own flow, but for the run's end: what that brings is the loop's."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        saves = control.should_save
        control = super().on_step_end(args, state, control, **kwargs)
        control.should_save &= saves or args.save_steps is not None
        return control


class Callbacks:
    """Tells callbacks what happens, and holds what they wish.

    Attributes:
        handler: transformers' handler, which has the list.
        state: `epoch` counts as `num_train_epochs` does, in steps; a stream is one epoch, the first.
        train_metrics: what the whole training came to; empty before its end.
    """

    def __init__(self, callbacks: Iterable[Any], run: Run) -> None:
        self.args, engine = run.config, run.student.engine
        self._step_rows = self.args.global_batch(run.world_size)
        self._epoch_rows: int | None = None
        if run.data is not None and run.data.has_length:
            self._epoch_rows = run.data.num_rows
        self._in_epoch = False
        self._folder = run.checkpoints.folder
        self.progress = TrainState()  # until `train_begin`
        self.train_metrics: dict[str, float] = {}
        self.handler = CallbackHandler(
            [Flow(), *callbacks], run.student.model, run.tokenizer, engine.optimizer, engine.lr_scheduler
        )
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=run.num_steps,
            num_train_epochs=math.ceil(self._epoch_of(run.num_steps)),
            train_batch_size=self.args.per_device_train_batch_size,
            is_local_process_zero=hosts.local_rank() == 0,
            is_world_process_zero=run.rank == 0,
        )
        self.state.compute_steps(self.args, run.num_steps)
        self.tell("on_init_end")

    def tell(self, event: str, **kwargs: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **kwargs)
        if self.control.should_epoch_stop:
            raise ValueError(
                "a callback set control.should_epoch_stop: the order of rows has no epoch to leave early. "
                "control.should_training_stop ends the run"
            )

    @property
    def wishes(self) -> Wishes:
        control = self.control
        return Wishes(control.should_save, control.should_evaluate, control.should_log, control.should_training_stop)

    @property
    def evaluates_at_end(self) -> bool:
        """Whether the configuration has the run evaluated after its last step, where there are rows for it."""
        args = self.args
        if not args.has_eval_strategy:
            return True
        passed = self.state.epoch if args.eval_strategy == "epoch" else self.state.global_step
        return args.eval_strategy != "no" and args.eval_delay <= passed

    def can_add_metrics(self) -> bool:
        """Whether one of the callbacks may put a metric of its own into an evaluation."""
        kinds = [type(callback) for callback in self.handler.callbacks]
        return any(
            kind.on_evaluate is not TrainerCallback.on_evaluate and not issubclass(kind, ADDS_NO_METRICS)
            for kind in kinds
        )

    def restore(self, checkpoint: Path) -> None:
        """Take up the history that a checkpoint holds, and the callbacks' states where that is asked for."""
        if not (checkpoint / TRAINER_STATE).is_file():  # an older engine's
            return
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.state.log_history = saved.log_history
        if not self.args.restore_callback_states_from_checkpoint:
            return
        states = {name: one if isinstance(one, list) else [one] for name, one in saved.stateful_callbacks.items()}
        callbacks = self.handler.callbacks
        for place, callback in enumerate(callbacks):
            if isinstance(callback, ExportableState) and (waiting := states.get(type(callback).__name__)):
                callbacks[place] = type(callback).from_state(waiting.pop(0))
        left = sorted(name for name, waiting in states.items() if waiting)
        if left:
            logger.warning("%s holds states of callbacks that this run does not have: %s", checkpoint, ", ".join(left))

    def exported_state(self) -> TrainerState:
        """The state as a checkpoint holds it: with those of the callbacks that have one."""
        self._take_best()
        callbacks = [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]
        return dataclasses.replace(self.state, stateful_callbacks=callbacks)

    def train_begin(self, progress: TrainState) -> None:
        """`progress` is where the run stands; it stays this one."""
        self.progress = progress
        self._first_step, self._started_s = progress.step, time.time()
        self._loss_sum, self._num_losses = 0.0, 0
        self._take_step()
        self.tell("on_train_begin")

    def step_begin(self) -> None:
        if not self._in_epoch:
            self._in_epoch = True
            self.tell("on_epoch_begin")
        self.tell("on_step_begin")

    def step_end(self, loss: float) -> None:
        epoch = int(self.state.epoch)
        self._take_step()
        if math.isfinite(loss):
            self.progress.loss_sum += loss
            self.progress.loss_steps += 1
            self._loss_sum += loss
            self._num_losses += 1
        self.tell("on_step_end")
        if int(self.state.epoch) > epoch or self.state.global_step == self.state.max_steps:
            self._epoch_end()

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Log a step: `loss` is the mean of the finite losses since the last one that was logged."""
        progress = self.progress
        loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else metrics["train/loss"]
        progress.loss_sum, progress.loss_steps = 0.0, 0
        names = {"loss": loss, "grad_norm": metrics["train/grad_norm"], "learning_rate": metrics["train/lr"]}
        self.log({**names, **metrics})

    def log(self, metrics: Mapping[str, Any]) -> None:
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.tell("on_log", logs=logs)

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Callbacks may add to the metrics, as to transformers' own."""
        self.log(metrics)
        self.tell("on_evaluate", metrics=metrics)

    def saved(self) -> None:
        self._take_best()
        self.tell("on_save")

    def log_training(self) -> None:
        """End the epoch, and log what the whole training came to, as transformers does."""
        if self._in_epoch:
            self._epoch_end()
        num_steps = self.state.global_step - self._first_step
        self.train_metrics = {
            **speed_metrics("train", self._started_s, num_steps * self._step_rows, num_steps),
            "train_loss": self._loss_sum / self._num_losses if self._num_losses else 0.0,
            "total_flos": self.state.total_flos,
        }
        self.log(self.train_metrics)

    def train_end(self) -> None:
        self._take_best()
        if self._in_epoch:
            self._epoch_end()
        self.tell("on_train_end")

    def _epoch_end(self) -> None:
        self._in_epoch = False
        self.tell("on_epoch_end")

    def _take_step(self) -> None:
        self.state.global_step = self.progress.step
        self.state.epoch = self._epoch_of(self.progress.step)
        self._take_best()

    def _take_best(self) -> None:
        state, progress = self.state, self.progress
        state.best_metric, state.best_global_step = progress.best_metric, progress.best_step
        best = progress.best_checkpoint
        state.best_model_checkpoint = None if best is None else str(self._folder / f"step_{best}")

    def _epoch_of(self, step: int) -> float:
        return step * self._step_rows / self._epoch_rows if self._epoch_rows else 0.0

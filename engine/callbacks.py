"""Callbacks: transformers' own events, state and control, at the moments of this loop.

The loop's flow (when to log, evaluate and save) is the first of the callbacks, so that what a configuration says and
what a callback wishes take one way. No collectives: a wish is this rank's, and `Watch.agree` makes it everyone's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from engine.assembly import Run
from engine.cluster import hosts
from engine.cluster.signals import Wishes
from engine.tracking.progress import is_line_due

logger = logging.getLogger(__name__)

# DeepSpeed clips, steps and clears the gradients in one call, and runs the micro-batches as one step.
NEVER_CALLED = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")


def check_callback(callback: Any) -> Any:
    """The callback, a `TrainerCallback` or a class of one.

    Raises:
        ValueError: where it is another thing, or needs what `GKDConfig` does not have.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, TrainerCallback):
        raise ValueError(f"callbacks: {callback!r} is no transformers.TrainerCallback, nor a class of one")
    if issubclass(kind, EarlyStoppingCallback):
        raise ValueError(
            f"callbacks: {kind.__name__} needs metric_for_best_model and load_best_model_at_end, which GKDConfig does "
            "not have: set control.should_training_stop in the on_evaluate of a callback of your own"
        )
    if issubclass(kind, DefaultFlowCallback):
        raise ValueError(
            f"callbacks: {kind.__name__} is not needed: logging_steps, eval_steps and save_steps of GKDConfig set when"
            " a step is logged, evaluated and saved"
        )
    for name in NEVER_CALLED:
        if getattr(kind, name) is not getattr(TrainerCallback, name):
            logger.warning("%s.%s is never called: DeepSpeed's step has no such moment", kind.__name__, name)
    return callback


class Flow(DefaultFlowCallback):
    """What the configuration says is due after a step. What the run's end brings is the loop's own."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        step = state.global_step
        control.should_log |= is_line_due(step, self._first_step, state.max_steps, args.logging_steps)
        control.should_evaluate |= args.eval_steps is not None and step % args.eval_steps == 0
        control.should_save |= args.save_steps is not None and step % args.save_steps == 0
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return control


class Callbacks:
    """Tells callbacks what happens, and holds what they wish.

    Attributes:
        handler: transformers' handler, which has the list.
        state: `epoch` counts as `num_train_epochs` does, in steps; a stream is one epoch, the first.
    """

    def __init__(self, callbacks: Iterable[Any], run: Run) -> None:
        self.args, engine = run.config, run.student.engine
        assert run.data is not None
        self._step_rows, self._epoch_rows = run.data.global_batch, run.data.num_rows if run.data.has_length else None
        self._in_epoch = False
        self.handler = CallbackHandler(
            [Flow(), *callbacks], run.student.model, run.tokenizer, engine.optimizer, engine.lr_scheduler
        )
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=run.num_steps,
            num_train_epochs=math.ceil(self._epoch_of(run.num_steps)),
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

    def train_begin(self, step: int) -> None:
        self._take_step(step)
        self.tell("on_train_begin")

    def step_begin(self) -> None:
        if not self._in_epoch:
            self._in_epoch = True
            self.tell("on_epoch_begin")
        self.tell("on_step_begin")

    def step_end(self, step: int) -> None:
        epoch = int(self.state.epoch)
        self._take_step(step)
        self.tell("on_step_end")
        if int(self.state.epoch) > epoch:
            self._epoch_end()

    def log(self, metrics: Mapping[str, Any]) -> None:
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.tell("on_log", logs=logs)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        self.log(metrics)
        self.tell("on_evaluate", metrics=dict(metrics))

    def train_end(self, metrics: Mapping[str, Any]) -> None:
        """The end of training, whose figures `metrics` are."""
        if self._in_epoch:
            self._epoch_end()
        self.log(metrics)
        self.tell("on_train_end")

    def _epoch_end(self) -> None:
        self._in_epoch = False
        self.tell("on_epoch_end")

    def _take_step(self, step: int) -> None:
        self.state.global_step = step
        self.state.epoch = self._epoch_of(step)

    def _epoch_of(self, step: int) -> float:
        return step * self._step_rows / self._epoch_rows if self._epoch_rows else 0.0

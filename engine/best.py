"""The best evaluation of a run, and its best checkpoint: of those written at a step that was evaluated.

Knows metrics by the names that scripts have for them. What is best so far stands in the run's `TrainState`, so that a
resumed run goes on from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from engine.assembly import Run
from engine.checkpoint.checkpoint import TrainState
from engine.checkpoint.manifest import verify
from engine.cluster.agreement import from_main
from engine.config import GKDConfig
from engine.errors import CheckpointError
from engine.evaluation import Evaluator, script_names

logger = logging.getLogger(__name__)


def metric_to_watch(config: GKDConfig) -> str | None:
    """`metric_for_best_model` with its `eval_`; None where nothing is to be best."""
    name = config.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def missing_metric(name: str, known: Mapping[str, Any]) -> str:
    names = ", ".join(key.removeprefix("eval_") for key in known if key.startswith("eval_"))
    return f"metric_for_best_model={name.removeprefix('eval_')!r} is no metric of an evaluation here; there are {names}"


class Best:
    """Judges evaluations, marks checkpoints, and loads the best one.

    Attributes:
        name: the metric that counts; None where nothing is to be best.
        improved: whether the newest evaluation is the best so far.
    """

    def __init__(self, config: GKDConfig) -> None:
        self.name = metric_to_watch(config)
        self.improved = False
        self._saves = config.save_strategy == "best"
        self._sign = 1 if config.greater_is_better else -1
        self._value, self._step = math.nan, -1  # of the newest evaluation

    def problem(self, evaluator: Evaluator | None, may_gain_metrics: bool) -> str | None:
        """What is wrong with `metric_for_best_model`, as far as that can be known before an evaluation."""
        if self.name is None or evaluator is None or may_gain_metrics:
            return None
        known = script_names(dict.fromkeys(evaluator.names, 0.0))
        return None if self.name in known else missing_metric(self.name, known)

    @property
    def wants_save(self) -> bool:
        """Whether `save_strategy` is `best`, and the newest evaluation is that."""
        return self._saves and self.improved

    def judge(self, metrics: Mapping[str, Any], state: TrainState) -> None:
        """Take an evaluation into account. Rank 0's value counts, as a callback may have added it. All ranks must call.

        Raises:
            ValueError: where the evaluation has no such metric.
        """
        self.improved = False
        if self.name is None:
            return
        value = from_main(metrics.get(self.name))
        if value is None:
            raise ValueError(missing_metric(self.name, metrics))
        self._value, self._step = float(value), state.step
        if self._is_better(state.best_metric):
            state.best_metric, state.best_step = self._value, state.step
            self.improved = True

    def mark(self, state: TrainState) -> bool:
        """Take the checkpoint of this step, which is there or about to be, for the best one if it is that."""
        if self._step != state.step or not self._is_better(state.best_checkpoint_metric):
            return False
        state.best_checkpoint_metric, state.best_checkpoint = self._value, state.step
        return True

    def load(self, run: Run, state: TrainState) -> bool:
        """Give the student the weights of the best checkpoint; False where there is none. All ranks must call.

        Raises:
            CheckpointError: where it is damaged.
        """
        step = state.best_checkpoint
        if step is None:
            if run.rank == 0:
                logger.warning("load_best_model_at_end: no checkpoint of an evaluated step, the weights stay the last")
            return False
        if step != state.step:
            path = run.checkpoints.folder / f"step_{step}"
            if problems := verify(path):
                raise CheckpointError(f"the best checkpoint cannot be loaded: {'; '.join(problems)}")
            run.checkpoints.load_weights(path, run.student.engine)
        if run.rank == 0:
            value = state.best_checkpoint_metric
            logger.info("the weights are those of step %d, the best: %s %s", step, self.name, value)
        return True

    def _is_better(self, than: float | None) -> bool:
        return not math.isnan(self._value) and (than is None or self._sign * self._value > self._sign * than)

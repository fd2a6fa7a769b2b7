"""Learning-rate schedules: transformers', by name, and those that were handed over.

DeepSpeed advances a schedule after each step that was applied. One that goes by a metric is advanced by evaluations
instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from engine.config import GKDConfig

BY_METRIC = ("reduce_lr_on_plateau", "greedy")
WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # transformers would pass them over


class Schedule(Protocol):
    """What DeepSpeed, and a checkpoint, ask of a schedule."""

    def step(self) -> None: ...
    def get_last_lr(self) -> list[float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class MetricSchedule:
    """A schedule that an evaluation's metric advances, and a step does not: ReduceLROnPlateau, or GreedyLR."""

    def __init__(self, inner: Any, metric: str | None) -> None:
        """`metric` as `metric_for_best_model`: `loss` is the held-out divergence."""
        self.inner, self.metric = inner, "eval_" + (metric or "loss").removeprefix("eval_")

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation by the names that scripts read. ValueError where the one that counts is missing."""
        if self.metric not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
            raise ValueError(f"metric_for_best_model: the schedule goes by {self.metric}, and there are {known}")
        self.inner.step(metrics[self.metric])

    def step(self) -> None:
        """What DeepSpeed calls after each step."""

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.inner.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def build_schedule(optimizer: Optimizer, config: GKDConfig, num_steps: int) -> Schedule:
    """transformers' schedule of that name, with warm-up.

    Raises:
        ValueError: for `lr_scheduler_kwargs` that it does not take, or lacks.
    """
    name, given = config.lr_scheduler_type, config.lr_scheduler_kwargs
    assert not isinstance(given, str)  # `GKDConfig` has read it
    arguments = dict(given or {})
    if name in WITHOUT_ARGUMENTS and arguments:
        raise ValueError(f"lr_scheduler_kwargs={arguments!r}: lr_scheduler_type={name} takes none")
    if name in BY_METRIC:
        arguments = {"mode": "max" if config.greater_is_better else "min"} | arguments
    try:
        schedule = get_scheduler(
            SchedulerType(name), optimizer, num_warmup_steps=config.get_warmup_steps(num_steps),
            num_training_steps=num_steps, scheduler_specific_kwargs=arguments,
        )  # fmt: skip
        if isinstance(schedule, LambdaLR):  # an argument of a wrong type shows where it is computed with
            [rate(step) for rate in schedule.lr_lambdas for step in (num_steps // 2, num_steps)]
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type={name} with lr_scheduler_kwargs={config.lr_scheduler_kwargs!r}: {error}"
        ) from error
    return MetricSchedule(schedule, config.metric_for_best_model) if name in BY_METRIC else schedule


def check_schedule(config: GKDConfig) -> None:
    """Build the schedule once, on nothing, before a model loads. ValueError as `build_schedule`."""
    nothing = SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    longer_than_warmup = int(2 * config.warmup_steps) + 10
    build_schedule(nothing, config, config.max_steps if config.max_steps > 0 else longer_than_warmup)


def given_schedule(given: Any, optimizer: Optimizer, config: GKDConfig) -> Schedule:
    """A schedule that was handed over: made for that optimizer, or a function that makes one for it.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(given, LRScheduler) and callable(given):
        given = given(optimizer)
    if not isinstance(given, LRScheduler):
        raise ValueError(
            f"optimizers=: {type(given).__name__} is no schedule; hand over one of torch.optim.lr_scheduler, or a "
            "function that makes one for an optimizer, or set `lr_scheduler_type`"
        )
    if given.optimizer is not optimizer:
        raise ValueError(
            "optimizers=: the schedule is that of another optimizer; hand both over, or a function that makes the "
            "schedule for an optimizer"
        )
    if not isinstance(given, ReduceLROnPlateau):
        return given
    return MetricSchedule(given, config.metric_for_best_model)

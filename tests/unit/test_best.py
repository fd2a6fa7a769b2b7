"""What is best, of evaluations and of checkpoints, and the names that scripts read."""

from __future__ import annotations

import math

import pytest

from engine.best import Best
from engine.checkpoint.checkpoint import TrainState
from engine.config import GKDConfig
from engine.evaluation import script_names


def judged(config: GKDConfig, values: list[float], saved: set[int]) -> tuple[TrainState, list[bool]]:
    """State and improvements after steps that evaluate to `values`; those in `saved` have a checkpoint."""
    best, state, improved = Best(config), TrainState(), []
    for state.step, value in enumerate(values, start=1):
        best.judge({"eval_loss": value, "eval_score": value}, state)
        improved.append(best.improved)
        if state.step in saved:
            best.mark(state)
    return state, improved


def test_less_of_a_loss_is_better_and_more_of_a_score():
    values = [2.0, 1.0, 3.0]
    state, improved = judged(GKDConfig(metric_for_best_model="loss"), values, {1, 2, 3})
    assert (state.best_metric, state.best_step, state.best_checkpoint) == (1.0, 2, 2)
    assert improved == [True, True, False]
    state, improved = judged(GKDConfig(metric_for_best_model="eval_score"), values, {1, 2, 3})
    assert (state.best_metric, state.best_step, state.best_checkpoint) == (3.0, 3, 3)
    assert improved == [True, False, True]


def test_the_best_checkpoint_is_the_best_of_those_that_are_there():
    state, _ = judged(GKDConfig(metric_for_best_model="loss"), [4.0, 3.0, 1.0, 2.0], {2, 4})
    assert (state.best_metric, state.best_step) == (1.0, 3)
    assert (state.best_checkpoint_metric, state.best_checkpoint) == (2.0, 4)


def test_an_equal_value_is_no_better_and_no_number_is_worse_than_any():
    state, improved = judged(GKDConfig(metric_for_best_model="loss"), [math.nan, 2.0, math.nan, 2.0], {1, 2, 3, 4})
    assert improved == [False, True, False, False]
    assert (state.best_step, state.best_checkpoint) == (2, 2)


def test_a_checkpoint_of_a_step_without_an_evaluation_is_not_the_best():
    best, state = Best(GKDConfig(metric_for_best_model="loss")), TrainState(step=1)
    best.judge({"eval_loss": 1.0}, state)
    state.step = 2
    assert not best.mark(state) and state.best_checkpoint is None


def test_a_missing_metric_is_named_with_those_that_are_there():
    best = Best(GKDConfig(metric_for_best_model="accuracy"))
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy' is no metric .* there are loss, perplexity"):
        best.judge({"eval_loss": 1.0, "eval_perplexity": 2.0, "eval/divergence": 1.0}, TrainState(step=1))


def test_names_of_one_set_and_of_several():
    metrics = {"eval/divergence": 1.0, "eval/top1_agreement": 0.5, "eval/math/divergence": 2.0, "eval/math/nll": 3.0}
    assert script_names(metrics) == {
        "eval_loss": 1.0, "eval_divergence": 1.0, "eval_top1_agreement": 0.5, "eval_math_loss": 2.0,
        "eval_math_divergence": 2.0, "eval_math_nll": 3.0,
    }  # fmt: skip
    assert script_names({"eval/divergence": 1.0}, "test") == {"test_loss": 1.0, "test_divergence": 1.0}

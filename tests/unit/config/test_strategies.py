"""When to log, evaluate and save: what is unset, what is `no`, shares of the steps, and contradictions."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engine.config import GKDConfig, config_from_dict


def test_an_eval_strategy_that_is_unset_reads_no_and_stays_unset():
    config = GKDConfig()
    assert config.eval_strategy == "no" and not config.has_eval_strategy and not config.do_eval
    saved = json.loads(json.dumps(config.to_dict()))
    assert saved["eval_strategy"] is None
    for other in (config_from_dict(saved), dataclasses.replace(config), GKDConfig(eval_strategy=None)):
        assert not other.has_eval_strategy and other == config
    given = GKDConfig(eval_strategy="no")
    assert given.has_eval_strategy and config_from_dict(given.to_dict()).has_eval_strategy


def test_eval_steps_alone_read_as_steps():
    config = GKDConfig(eval_steps=5)
    assert config.eval_strategy == "steps" and config.do_eval and not config.has_eval_strategy
    other = config_from_dict(config.to_dict() | {"eval_steps": None})
    assert other.eval_strategy == "no" and not other.has_eval_strategy


def test_steps_without_a_number_are_those_of_logging():
    assert GKDConfig(eval_strategy="steps").eval_steps == 10
    assert GKDConfig(eval_strategy="steps", logging_steps=3).eval_steps == 3
    assert GKDConfig(eval_strategy="epoch").eval_steps is None


@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps", "warmup_steps"])
def test_steps_are_whole_or_a_share(name):
    for given, expected in (("7", 7), (7.0, 7), (1, 1), (0.25, 0.25), ("1e-1", 0.1)):
        value = getattr(GKDConfig(**{name: given}), name)
        assert value == expected and type(value) is type(expected)
    with pytest.raises(ValueError, match=f"{name}=2.5: must be a whole number of steps, or below 1 for a share"):
        GKDConfig(**{name: 2.5})
    with pytest.raises(ValueError, match=f"{name}=-1"):
        GKDConfig(**{name: -1})


def test_warm_up_in_steps_or_as_a_share():
    assert GKDConfig(warmup_steps=7).get_warmup_steps(100) == 7
    assert GKDConfig(warmup_steps=0.1).get_warmup_steps(25) == 3  # rounded up, as transformers does
    assert GKDConfig(warmup_ratio=0.1).get_warmup_steps(25) == 3
    assert GKDConfig(warmup_ratio=1.0).get_warmup_steps(25) == 25
    assert GKDConfig(warmup_ratio=0.1, warmup_steps=7).get_warmup_steps(25) == 7
    assert GKDConfig().get_warmup_steps(25) == 0


BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    "fields,message",
    [
        (BEST, "eval_strategy=no and save_strategy=steps: make the two equal, or set save_strategy=best"),
        (BEST | {"eval_strategy": "epoch"}, "eval_strategy=epoch and save_strategy=steps"),
        (BEST | {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 10}, "save_steps must be a multiple of eval"),
        (BEST | {"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 10}, "both whole or both a share"),
        (BEST | {"eval_strategy": "steps", "eval_steps": 20, "save_steps": 10}, "save_steps=10, eval_steps=20"),
        (BEST | {"eval_steps": 5, "save_steps": 5, "save_only_model": True}, "takes weights back from a whole"),
        ({"save_strategy": "best"}, "save_strategy=best goes by evaluations"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type=reduce_lr_on_plateau goes by evaluations"),
        ({"eval_strategy": "best"}, "eval_strategy='best': must be one of no, steps, epoch"),
        ({"logging_steps": 0}, "logging_steps=0: must be positive; logging_strategy=no logs nothing"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        GKDConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 10},
        {"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
        {"eval_steps": 5, "save_steps": 10},
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {"eval_strategy": "steps", "save_strategy": "best"},
    ],
)
def test_a_best_model_that_can_be_told(fields):
    config = GKDConfig(**BEST, **fields)
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)


def test_more_of_a_metric_is_better_unless_it_is_a_loss():
    assert GKDConfig(metric_for_best_model="eval_accuracy").greater_is_better is True
    assert GKDConfig(metric_for_best_model="eval_loss").greater_is_better is False
    assert GKDConfig(metric_for_best_model="eval_accuracy", greater_is_better=False).greater_is_better is False
    for name in ("perplexity", "eval_divergence_on_policy", "eval_math_divergence"):
        assert GKDConfig(metric_for_best_model=name).greater_is_better is False
    assert GKDConfig(metric_for_best_model="eval_top1_agreement").greater_is_better is True
    with pytest.raises(ValueError, match="mean_length.*set greater_is_better"):
        GKDConfig(metric_for_best_model="mean_length")
    assert GKDConfig().metric_for_best_model is GKDConfig().greater_is_better is None


def test_a_limit_of_no_checkpoints_is_none():
    assert GKDConfig(save_total_limit=0).save_total_limit is None
    with pytest.raises(ValueError, match="save_total_limit=-1"):
        GKDConfig(save_total_limit=-1)

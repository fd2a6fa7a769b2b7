"""Callbacks are transformers' own; what could not work is said before a model loads."""

import pytest
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from engine import GKDConfig, GKDTrainer
from engine.callbacks import check_callback


@pytest.mark.parametrize(
    ("callback", "text"),
    [(print, "no transformers.TrainerCallback"), (EarlyStoppingCallback(), "metric_for_best_model"),
     (DefaultFlowCallback, "is not needed: logging_steps")],
)  # fmt: skip
def test_what_cannot_work_is_refused_first(callback, text):
    with pytest.raises(ValueError, match=text):
        GKDTrainer(callbacks=[callback])


def test_an_event_that_never_comes_is_named(caplog):
    class Gradients(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            """Would look at gradients."""

    check_callback(Gradients, GKDConfig())
    assert "Gradients.on_optimizer_step is never called" in caplog.text
    caplog.clear()
    assert isinstance(check_callback(ProgressCallback(), GKDConfig()), ProgressCallback) and not caplog.text


def test_early_stopping_needs_evaluations_and_a_metric():
    stopping = EarlyStoppingCallback()
    for fields in ({"eval_strategy": "steps"}, {"metric_for_best_model": "loss"}):
        with pytest.raises(ValueError, match="set eval_strategy to steps or epoch, and metric_for_best_model"):
            check_callback(stopping, GKDConfig(**fields))
    assert check_callback(stopping, GKDConfig(eval_strategy="epoch", metric_for_best_model="loss")) is stopping

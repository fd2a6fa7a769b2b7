"""`GKDTrainer`: what a script builds and calls. The training itself is `loop`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from engine.assembly import assemble, build_evaluator, resume
from engine.callbacks import check_callback
from engine.config import GKDConfig
from engine.data.encoding import Format
from engine.evaluation import script_names
from engine.inputs import Inputs
from engine.loop import Loop
from engine.loss.generalized_jsd import generalized_jsd_loss
from engine.paths import expand_path
from engine.scripting import Scripting


class GKDTrainer(Scripting):
    """Distils a teacher into a student. The call signature is that of TRL's `GKDTrainer`.

    Args:
        model, teacher_model: Hugging Face causal LMs, or names; by default those that `args` names.
        args: the configuration.
        data_collator: refused; rows are packed by the engine.
        train_dataset, eval_dataset: datasets with `messages`, `prompt`/`completion`, `prompt`, or
            `input_ids`/`labels` columns; by default the one that `args` names. Without rows to train on, the trainer
            evaluates alone.
        processing_class, tokenizer: the student's tokenizer (or processor); two names for one argument.
        compute_metrics, preprocess_logits_for_metrics: refused; no rank ever has logits.
        callbacks: `transformers.TrainerCallback`s, or classes of them. A wish on one rank (`control.should_save`,
            `should_evaluate`, `should_log`, `should_training_stop`) counts on all of them.
        optimizers: an optimizer of torch's that works element by element, over the weights of `model`, and a schedule
            of it; each may be None. The schedule may be a function that makes one for an optimizer.
        peft_config: refused.
        formatting_func: makes a row, a dict, of each that the datasets have; or a text.
        teacher_processing_class: the teacher's, to compare with the student's; by default that of the folder or hub
            name which the teacher came from.
        resumes_later: whether `train` may say what to resume. If not, a folder that holds a run is refused at once.

    Raises:
        ValueError: for input that cannot work, before any weight is read where `args` names the models.
    """

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: GKDConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Iterable[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        formatting_func: Format | None = None,
        tokenizer: Any = None,
        teacher_processing_class: Any = None,
        *,
        resumes_later: bool = True,
    ) -> None:
        refuse(
            data_collator=data_collator, compute_metrics=compute_metrics, peft_config=peft_config,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        if not isinstance(args, GKDConfig | None):
            raise ValueError(
                f"args: {type(args).__module__}.{type(args).__name__} is not engine's GKDConfig: import both"
            )
        config = args.checked_copy() if args is not None else GKDConfig()  # the caller's stays as it is
        callbacks = [check_callback(callback, config) for callback in callbacks or ()]
        if isinstance(model, str):
            config.model_name_or_path, model = expand_path(model, "model"), None
        if isinstance(teacher_model, str):
            config.teacher_model_name_or_path, teacher_model = expand_path(teacher_model, "teacher_model"), None
        self.train_dataset, self.eval_dataset, self.formatting_func = train_dataset, eval_dataset, formatting_func
        inputs = Inputs(
            model, teacher_model, processing_class if processing_class is not None else tokenizer, train_dataset,
            eval_dataset, teacher_processing_class, formatting_func, *optimizers,
        )  # fmt: skip
        trains = train_dataset is not None or config.dataset_name is not None
        self.run = assemble(config, inputs, trains, resumes_later)
        self.config = self.run.config  # with the global batch of the checkpoint
        self.loop = Loop(self.run, callbacks)
        self.callbacks, self.publication = self.loop.callbacks, self.loop.publication

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class to make one of."""
        self.callbacks.handler.add_callback(check_callback(callback, self.config))

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first one of a class, and return it; None where there is none."""
        return self.callbacks.handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first one of a class."""
        self.callbacks.handler.remove_callback(callback)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train to the last step, then evaluate and export; or stop early with a checkpoint. All ranks must call.

        `resume_from_checkpoint` is the path of a checkpoint of this configuration, or true for the newest one; where
        it is not given, that of `args` counts. Returns the last step, the mean loss, and how fast it was.

        Raises:
            ValueError: where there is no such checkpoint, the folder holds a run that nothing was said about, or there
                are no rows to train on.
        """
        if self.run.data is None:
            raise ValueError("train: there are no rows to train on: pass train_dataset= to the trainer")
        if self.loop.has_begun:
            raise ValueError(
                "train() was called before: a trainer trains once. Build another one to go on from its model"
            )
        if resume_from_checkpoint is False and self.config.resume_from_checkpoint is not None:
            raise ValueError(
                f"train(resume_from_checkpoint=False), and args resume from {self.config.resume_from_checkpoint!r}: "
                "leave one of them out"
            )
        if resume_from_checkpoint:
            resume(self.run, resume_from_checkpoint)
        elif self.run.problem is not None:
            raise ValueError(self.run.problem)
        return self.loop.train()

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate the student as it is: on the run's own rows, a dataset, or a dict of datasets. All ranks must call.

        Returns `eval_loss`, the divergence on the references, and the other figures of an evaluation, `eval_runtime`
        and `epoch`; of several sets, `eval_<set>_loss` and so on. `metric_key_prefix` takes the place of `eval`.

        Raises:
            ValueError: where there are no rows to evaluate on, or they cannot be used.
        """
        started_s = time.time()
        evaluator = (
            self.run.evaluator
            if eval_dataset is None
            else build_evaluator(self.run, eval_dataset, self.formatting_func)
        )
        if evaluator is None:
            raise ValueError("evaluate: there are no rows to evaluate on: pass eval_dataset, here or to the trainer")
        metrics = script_names(evaluator.run().metrics, metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - started_s, 4)
        self.callbacks.evaluated(metrics)
        return metrics | {"epoch": self.callbacks.state.epoch}

    def save_checkpoint(self) -> Path | None:
        """Write `checkpoints/step_<N>`; None where that failed and `save_on_error` is `warn`. All ranks must call."""
        return self.loop.save_checkpoint()


# What the engine cannot take, and the way there is instead.
REFUSED = {
    "data_collator": "rows are packed by the engine; give them another shape with formatting_func=",
    "compute_metrics": "no rank ever has logits; compute metrics in the on_evaluate of a callback",
    "preprocess_logits_for_metrics": "no rank ever has logits; compute metrics in the on_evaluate of a callback",
    "peft_config": "adapters are not trained by this engine; leave it out to train the whole student",
}


def refuse(**given: Any) -> None:
    """Raise ValueError for what was given though it cannot be used."""
    sentences = [f"{name}=: {REFUSED[name]}" for name, value in given.items() if value is not None]
    if sentences:
        raise ValueError("\n".join(sentences))

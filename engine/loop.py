"""Generalized knowledge distillation, Algorithm 1 of arXiv 2306.13649, as a loop over ZeRO-3 ranks."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_utils import TrainOutput

from engine.assembly import Run
from engine.best import Best
from engine.callbacks import Callbacks
from engine.checkpoint import run_folder
from engine.checkpoint.checkpoint import TrainState
from engine.cluster.agreement import raise_together
from engine.cluster.collectives import draw_seed, shared_uniform
from engine.cluster.signals import MAX_MINUTES, Due, Watch
from engine.data.batch import PackedBatch, Sample, pack
from engine.evaluation import Evaluation, script_names
from engine.loss.values import TokenValues
from engine.models.export import write_student
from engine.publication import Publication
from engine.tracking.bad_steps import sample_rows
from engine.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

VALUE_METRICS = {"divergence": "train/", "student_entropy": "train/", "nll": "train/", "acceptance": "train/",
                 "top1_agreement": "train/", "teacher_entropy": "teacher/"}  # fmt: skip


class Loop:
    """Trains one run, from where it stands to its end. All ranks must call.

    Attributes:
        state: where the run stands.
        evaluations: those of this process, in order.
        stopped_by: the signal, or `max_minutes`, that broke the run off before its last step.
        is_last: whether the step at hand is the run's last, by number or as a callback wished.
    """

    def __init__(self, run: Run, callbacks: Iterable[Any]) -> None:
        self.run, self.config = run, run.config
        self.state = TrainState(started=run.started)
        self.rollouts: list[list[Sample]] | None = None  # the batch that `rollout_reuse` steps share
        self.evaluations: list[Evaluation] = []
        self.watch = Watch(self.config, run.device)
        self.stopped_by: str | None = None
        self.is_last = False
        self.has_begun = False
        self._evaluated_step: int | None = None
        self.callbacks = Callbacks(callbacks, run)
        self.best = Best(self.config)
        self.publication = Publication(run)

    def train(self) -> TrainOutput:
        """Train to the last step, then evaluate and export; or stop early with a checkpoint.

        Returns the last step, the mean loss of the steps taken, and how fast they were.
        """
        self.has_begun = True
        with self.watch:
            self._open()
            self._train()
            if self.stopped_by is None:
                self._finish()
            if self.stopped_by is not None:
                self.callbacks.log_training()
            self.callbacks.train_end()
            self.tracker.finish()
        metrics = self.callbacks.train_metrics
        return TrainOutput(self.state.step, metrics["train_loss"], {**metrics, "epoch": self.callbacks.state.epoch})

    def _open(self) -> None:
        """Resume, and open the record."""
        run, config = self.run, self.config
        raise_together(self.best.problem(run.evaluator, self.callbacks.can_add_metrics()))
        if run.resume_from is not None:
            self.state = run.checkpoints.load(run.resume_from, run.student.engine)
            self.state.started = run.started
            self.rollouts = run.checkpoints.load_rollouts(run.resume_from)
            self.callbacks.restore(run.resume_from.path)
        elif config.overwrite_output_dir and self.state.step == 0:
            if run.rank == 0:
                run_folder.clear(Path(config.output_dir))
            dist.barrier()
        extra = {"deepspeed_resolved": run.deepspeed_settings, "world_size": run.world_size}
        self.tracker = Tracker(config, Path(config.output_dir), run.rank == 0, self.state.run_id, extra)
        self.state.run_id = self.tracker.run_id
        self.tracker.begin(self.state.step, run.num_steps)
        self.callbacks.train_begin(self.state)
        if config.eval_on_start and self.state.step == 0:
            self.tracker.log(0, self._evaluate())
        if self.state.owes_evaluation and self.state.step < run.num_steps:
            self._evaluate_saved_step()

    def _train(self) -> None:
        while self.state.step < self.run.num_steps and not self.is_last and self.stopped_by is None:
            self.callbacks.step_begin()
            metrics = self._train_step()
            self.callbacks.step_end(metrics["train/loss"])
            self._close_step(metrics)

    def _close_step(self, metrics: dict[str, float]) -> None:
        """Log, evaluate and save, where that is due. Then what callbacks wished meanwhile: another save, or the end."""
        step, due = self.state.step, self._agree()
        if due.log:
            self.callbacks.log_step(metrics)
        evaluates = due.evaluate and not self.is_last and self.stopped_by is None
        self.state.owes_evaluation = due.evaluate and not evaluates
        if evaluates:
            metrics |= self._evaluate()
        self.tracker.log(step, metrics, is_wanted=due.log)
        self.publication.note(step, metrics)
        saves = self._save_is_due(due) or (evaluates and self.best.wants_save)
        if saves:
            self.save_checkpoint()
        if due.log or evaluates or saves:
            due = self._agree()
            if self._save_is_due(due) and not saves:
                self.save_checkpoint()

    def _agree(self) -> Due:
        """What is due now, on every rank; notes whether the run ends here."""
        step, due = self.state.step, self.watch.agree(self.callbacks.wishes)
        if due.end and not self.is_last and step < self.run.num_steps and self.run.rank == 0:
            logger.info("a callback ends the run: step %d of %d is its last", step, self.run.num_steps)
        self.is_last |= due.end or step == self.run.num_steps
        self.stopped_by = due.stop if due.by_signal or not self.is_last else None
        return due

    def _save_is_due(self, due: Due) -> bool:
        config = self.config
        by_steps = config.save_strategy == "epoch" or (
            config.save_strategy == "steps" and config.save_steps is not None
        )
        return due.save or (self.is_last and (by_steps or config.save_minutes is not None))

    def _finish(self) -> None:
        """What follows the last step. A run that has got there before, and is resumed, does this alone."""
        wants_evaluation = self.callbacks.evaluates_at_end or self.state.owes_evaluation
        if self.run.evaluator and wants_evaluation and self._evaluated_step != self.state.step:
            self._evaluate_saved_step()
        elif self.run.evaluator:
            self._save_late(self._agree())
        if self.stopped_by is not None:
            return
        self.callbacks.log_training()
        out = Path(self.config.output_dir) / run_folder.EXPORT
        self.publication.export(out)
        if self.config.load_best_model_at_end and self.best.load(self.run, self.state):
            out = Path(self.config.output_dir) / run_folder.BEST
            self.publication.export(out)
        if self.config.push_to_hub:
            self.callbacks.tell("on_push_begin")
            self.publication.push(out, "End of training")

    def _evaluate_saved_step(self) -> None:
        """Evaluate a step that may have its checkpoint already."""
        state, checkpoints = self.state, self.run.checkpoints
        metrics = self._evaluate()
        self.tracker.log(state.step, metrics)
        self.publication.note(state.step, metrics)
        state.owes_evaluation = False
        self._save_late(self._agree())
        if checkpoints.saved_step == state.step and self.best.mark(state):
            checkpoints.note_best(state)

    def _save_late(self, due: Due) -> None:
        """Save after an evaluation, where that is wanted and has not been done."""
        wants = self.best.wants_save or (due.save and due.stop != MAX_MINUTES)
        if wants and self.run.checkpoints.saved_step != self.state.step:
            self.save_checkpoint()

    def _train_step(self) -> dict[str, float]:
        """One optimizer step."""
        run, state, tracker = self.run, self.state, self.tracker
        started = time.perf_counter()
        torch.manual_seed(draw_seed(self.config.seed, "dropout", state.step, run.rank))
        samples, metrics = self._next_samples()  # (x, y): from the data, the student or the teacher
        batches = [pack(batch, run.device) for batch in samples]
        on_policy = bool(metrics["train/on_policy"])
        with tracker.time("idle"):
            loss_step = run.objective.begin(batches, with_references=not on_policy)
        with tracker.time("student"):
            run.student.open_step(train=True)
        signals = run.teacher.signals(batches)
        for micro, batch in enumerate(batches):
            with tracker.time("teacher"):
                signal = next(signals)
            with tracker.time("student"):
                student_NH = run.student.hidden(batch, state.step)
            with tracker.time("loss"):
                loss = loss_step(student_NH, signal, micro, run.student.router_loss(len(batches)))
            with tracker.time("backward"):
                run.student.backward(loss, is_last=micro + 1 == len(batches))
        with tracker.time("idle"):
            means, loss_global, num_tokens = loss_step.reduce()
        learning_rate = run.student.learning_rate
        with tracker.time("optimizer"):
            was_applied = run.student.step(is_finite=math.isfinite(loss_global))
        state.step += 1
        state.tokens += int(num_tokens)
        run.bad_steps.record(state, was_applied, samples, batches, loss_step.values)
        self._log_completions(samples, batches, loss_step.values, on_policy)
        step_s = time.perf_counter() - started
        metrics |= {VALUE_METRICS.get(name, "train/") + name: value for name, value in means.items()}
        writes = "rollout/tokens" in metrics
        metrics |= run.meter.metrics(batches, writes and on_policy, writes and not on_policy, step_s)
        return metrics | {
            "train/loss": loss_global,
            "train/grad_norm": run.student.grad_norm,
            "train/lr": learning_rate,
            "train/tokens": num_tokens,
            "train/tokens_total": float(state.tokens),
            "train/bad_steps": float(state.bad_steps),
            "perf/step_s": step_s,
            "perf/tokens_per_s": num_tokens / step_s,
        }

    def _next_samples(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """This step's micro-batches: on-policy with probability lmbda, else from the data or the teacher.

        The draw depends on (seed, step) alone, so every rank takes the same branch. With `rollout_reuse` k it is made
        once per k steps, which share the samples where it falls on-policy.
        """
        run, config, state = self.run, self.config, self.state
        assert run.data is not None
        block, age = divmod(state.step, config.rollout_reuse)
        on_policy = shared_uniform(config.seed, "on_policy", block) < config.lmbda
        metrics = {"train/on_policy": float(on_policy)}
        if on_policy and age and self.rollouts is not None:
            return self.rollouts, metrics | {"rollout/staleness": float(age)}
        writes = on_policy or config.seq_kd
        if not writes and run.data.lacks_answers(state.batches):
            samples = run.data.step_batches(state.answered_batches, answered=True)
            state.answered_batches += 1
        else:
            samples = run.data.step_batches(state.batches)  # (x, y) ~ (X, Y)
            state.batches += 1
        self.rollouts = None
        if writes:
            writer = run.student if on_policy else run.teacher  # y ~ p_S(.|x), or p_T(.|x)
            with self.tracker.time("rollout"):
                samples, rollout_metrics = run.rollout.generate(samples, state.step, writer)
            metrics |= rollout_metrics | {"rollout/staleness": 0.0}
        if on_policy and config.rollout_reuse > 1:
            self.rollouts = samples
        return samples, metrics

    def _log_completions(
        self, samples: list[list[Sample]], batches: list[PackedBatch], values: list[TokenValues], on_policy: bool
    ) -> None:
        every = self.config.log_completions_steps
        if not on_policy or not every or self.state.step % every:
            return
        rows = [list(row[1:]) for row in sample_rows(self.run.tokenizer, samples, batches, values)]
        self.tracker.table("completions", self.state.step, ["prompt", "sample", "mean_divergence"], rows)

    def _evaluate(self) -> dict[str, float]:
        if self.run.evaluator is None:
            raise ValueError(
                "a callback set control.should_evaluate, and there are no rows to evaluate on: pass eval_dataset=, or "
                "name a split with dataset_test_split"
            )
        with self.tracker.time("evaluation"):
            self.evaluations.append(self.run.evaluator.run())
        self._evaluated_step = self.state.step
        figures = self.evaluations[-1].metrics
        metrics: dict[str, Any] = {**figures, **script_names(figures)}
        self.run.student.note_metrics(metrics)
        self.callbacks.evaluated(metrics)
        if self.state.step > 0:
            self.best.judge(metrics, self.state)
        return figures

    def _write_model(self, folder: Path) -> None:
        write_student(self.run.student.model, self.run.parts, contextlib.nullcontext(folder))

    def save_checkpoint(self) -> Path | None:
        """Write `checkpoints/step_<N>`; None where that failed and `save_on_error` is `warn`. All ranks must call."""
        run = self.run
        self.callbacks.control.should_save = False  # also where it fails
        before = self.state.best_checkpoint_metric, self.state.best_checkpoint
        self.best.mark(self.state)
        trainer_state = self.callbacks.exported_state()
        with self.tracker.time("checkpoint"):
            path = run.checkpoints.save(
                run.student.engine, self.state, run.parts, self.rollouts, trainer_state, self._write_model
            )
        self.watch.note_save()
        if path is None:
            self.state.best_checkpoint_metric, self.state.best_checkpoint = before
        else:
            self.callbacks.saved()
            if self.stopped_by is None and not self.is_last and self.publication.push_checkpoint(self.state.step):
                self.callbacks.tell("on_push_begin")
        return path

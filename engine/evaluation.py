"""Evaluation on held-out rows: divergence on the references and on the student's own samples, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from engine.data.batch import Sample, pack
from engine.loss.objective import Objective
from engine.models.student import Student
from engine.rollout.rollout import Rollout
from engine.teacher.interface import Teacher

Batches: TypeAlias = list[list[Sample]]

METRICS = tuple(
    name for name in ("divergence", "perplexity", "acceptance", "top1_agreement", "divergence_on_policy", "mean_length")
)
NOTHING = Sample(prompt_ids=[0], input_ids=[0], response_mask=[False], index=-1)  # fills a rank's missing batch


def script_names(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """An evaluation's metrics by the names that scripts read: `eval_loss` is the divergence on the references.

    `eval/<set>/<metric>` of one of several sets is `eval_<set>_<metric>`.
    """
    named = {}
    for name, value in metrics.items():
        parts = [prefix, *name.split("/")[1:]]
        if parts[-1] == "divergence":
            named["_".join([*parts[:-1], "loss"])] = value
        named["_".join(parts)] = value
    return named


@dataclass(frozen=True)
class Evaluation:
    """Figures, and a row's prompt and sampled answer as token ids."""

    metrics: dict[str, float]
    prompt_ids: list[int]
    answer_ids: list[int]


class Evaluator:
    """Evaluates on fixed sets of rows. All ranks must call.

    Args:
        sets: by name, this rank's share; every rank has as many batches, some perhaps empty. A set without a name has
            metrics `eval/<metric>`, another `eval/<name>/<metric>`.
    """

    def __init__(
        self, sets: Mapping[str, Batches], objective: Objective, rollout: Rollout, student: Student, teacher: Teacher
    ) -> None:
        self.sets, self.objective, self.rollout = sets, objective, rollout
        self.student, self.teacher = student, teacher

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics that `run` gives."""
        return tuple("/".join(filter(None, ("eval", name, metric))) for name in self.sets for metric in METRICS)

    def run(self) -> Evaluation:
        """Samples use the same seeds every time, so that two evaluations differ by the student alone."""
        found = {name: self._run_set(batches) for name, batches in self.sets.items()}
        metrics = {
            "/".join(filter(None, ("eval", name, metric))): value
            for name, evaluation in found.items()
            for metric, value in evaluation.metrics.items()
        }
        first = next(iter(found.values()))
        return Evaluation(metrics, first.prompt_ids, first.answer_ids)

    def _run_set(self, batches: Batches) -> Evaluation:
        completions = self.rollout.complete([s for b in batches for s in b], 1, ("evaluation",), self.student)
        own = [[s.with_response(completions.token_ids[s.index]) for s in batch] for batch in batches]
        self.student.open_step(train=False)
        references, samples = self._means(batches), self._means(own)
        metrics = {
            "divergence": references["divergence"],
            "perplexity": math.exp(min(references["nll"], 700.0)),
            "acceptance": references["acceptance"],
            "top1_agreement": references["top1_agreement"],
            "divergence_on_policy": samples["divergence"],
            "mean_length": completions.metrics["rollout/mean_length"],
        }
        first = next((s for batch in batches for s in batch), NOTHING)
        return Evaluation(metrics, first.prompt_ids, completions.token_ids.get(first.index, []))

    @torch.no_grad()
    def _means(self, batches: Batches) -> dict[str, float]:
        packed = [pack(batch or [NOTHING], self.objective.device) for batch in batches]
        step = self.objective.begin(packed, with_references=False)
        for micro, (batch, signal) in enumerate(zip(packed, self.teacher.signals(packed), strict=True)):
            step(self.student.hidden(batch), signal, micro)
        return step.reduce().means

"""Evaluation on held-out rows: divergence on the references and on the student's own samples, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.data.batch import Sample, pack
from engine.loss.objective import Objective
from engine.models.student import Student
from engine.rollout.rollout import Rollout
from engine.teacher.interface import Teacher

NOTHING = Sample(prompt_ids=[0], input_ids=[0], response_mask=[False], index=-1)  # fills a rank's missing batch


@dataclass(frozen=True)
class Evaluation:
    """Figures, and one row's prompt and sampled answer as token ids."""

    metrics: dict[str, float]
    prompt_ids: list[int]
    answer_ids: list[int]


class Evaluator:
    """Evaluates on a fixed set of rows. All ranks must call.

    Args:
        batches: this rank's share; every rank has as many batches, some perhaps empty.
    """

    def __init__(
        self, batches: list[list[Sample]], objective: Objective, rollout: Rollout, student: Student, teacher: Teacher
    ) -> None:
        self.batches, self.objective, self.rollout = batches, objective, rollout
        self.student, self.teacher = student, teacher

    def run(self) -> Evaluation:
        """Samples use the same seeds every time, so that two evaluations differ by the student alone."""
        completions = self.rollout.complete([s for b in self.batches for s in b], 1, ("evaluation",), self.student)
        own = [[s.with_response(completions.token_ids[s.index]) for s in batch] for batch in self.batches]
        self.student.open_step(train=False)
        references, samples = self._means(self.batches), self._means(own)
        metrics = {
            "eval/divergence": references["divergence"],
            "eval/perplexity": math.exp(min(references["nll"], 700.0)),
            "eval/acceptance": references["acceptance"],
            "eval/top1_agreement": references["top1_agreement"],
            "eval/divergence_on_policy": samples["divergence"],
            "eval/mean_length": completions.metrics["rollout/mean_length"],
        }
        first = next((s for batch in self.batches for s in batch), NOTHING)
        return Evaluation(metrics, first.prompt_ids, completions.token_ids.get(first.index, []))

    @torch.no_grad()
    def _means(self, batches: list[list[Sample]]) -> dict[str, float]:
        packed = [pack(batch or [NOTHING], self.objective.device) for batch in batches]
        step = self.objective.begin(packed, with_references=False)
        for micro, (batch, signal) in enumerate(zip(packed, self.teacher.signals(packed), strict=True)):
            step(self.student.hidden(batch), signal, micro)
        return step.reduce().means

"""Trains as `engine train` does, on two hosts, and prints as JSON the bytes that a step receives from the other host
beside those of the formulas: `deepspeed ... --module tests.multinode.count_bytes RECIPE ...`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import yaml

from engine import GKDConfig, GKDTrainer
from engine.bench.measure import received_bytes
from engine.loss.objective import LossStep
from engine.plan import volume
from tests.library.network import INTERFACE

WARM_STEPS = 2  # the first opens connections and records the order in which parameters are used
FLOAT_BYTES = 4


class Counter:
    """Bytes received from the other host inside functions, by name; sums since `clear`."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}

    def wrap(self, name: str, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            before = self._read()
            result = function(*args, **kwargs)
            self.received[name] = self.received.get(name, 0) + self._read() - before
            return result

        return counted

    def _read(self) -> int:
        """The counter once all ranks are here and the last packets are in."""
        dist.barrier()
        time.sleep(0.1)
        received = received_bytes(INTERFACE)
        dist.barrier()
        return received


def main(recipes: list[Path]) -> None:
    for recipe in recipes:
        figures = count(GKDConfig(**yaml.safe_load(recipe.read_text())))
        if dist.get_rank() == 0:
            print("bytes", json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def count(config: GKDConfig) -> dict[str, dict[str, float]]:
    """Mean bytes of a step, after the first ones: of the loss and of the whole."""
    trainer, counter = GKDTrainer(args=config), Counter()
    run = trainer.run
    run.student.open_step = counter.wrap("loss", run.student.open_step)
    run.student.head.close_step = counter.wrap("loss", run.student.head.close_step)
    LossStep.__call__ = counter.wrap("loss", LossStep.__call__)
    step = counter.wrap("step", trainer.loop._train_step)
    per_step: list[dict[str, int]] = []

    def counted_step() -> dict[str, float]:
        counter.received.clear()
        metrics = step()
        per_step.append(dict(counter.received))
        trainer.tokens_per_rank = metrics["train/tokens"] / run.world_size
        return metrics

    trainer.loop._train_step = counted_step
    trainer.train()
    kept = per_step[WARM_STEPS:]
    measured = {name: sum(received[name] for received in kept) / len(kept) for name in ("loss", "step")}
    return {"measured": measured, "formula": formulas(trainer)}


def formulas(trainer: GKDTrainer) -> dict[str, float]:
    """Bytes of one step with one micro-batch and no rollout, fp32, between two hosts with half of the ranks each."""
    run, tokens = trainer.run, int(trainer.tokens_per_rank)
    world_size, group_size = run.world_size, run.student.head.groups.group_size
    student, teacher = run.student.model.config, run.teacher.model.config
    per_host = world_size // 2
    head = volume.head_bytes(student.vocab_size, student.hidden_size, world_size, group_size, FLOAT_BYTES)
    loss = head * per_host  # the ranks that hold the same rows are on different hosts
    if group_size == world_size:
        both_ways = volume.hidden_bytes(tokens, student.hidden_size, teacher.hidden_size, group_size, FLOAT_BYTES)
        back = (group_size - 1) * tokens * student.hidden_size * FLOAT_BYTES
        loss += volume.leaving_host_ring(both_ways - back + volume.scalar_bytes(tokens, group_size))
        loss += volume.leaving_host_exchange(back, world_size, per_host)
    backbone, teacher_backbone = (partitioned_elements(model) for model in (run.student.model, run.teacher.model))
    gathers = 2 * volume.zero3_gather_bytes(backbone, world_size, FLOAT_BYTES)
    gathers += volume.zero3_gather_bytes(teacher_backbone, world_size, FLOAT_BYTES)
    gradient = volume.zero3_gradient_bytes(backbone, world_size, FLOAT_BYTES, is_gloo=True)
    return {"loss": loss, "zero3": volume.leaving_host_ring(gathers + gradient)}


def partitioned_elements(model) -> int:
    """Elements of the parameters that ZeRO-3 gathers to run the backbone: all but the head and those it keeps whole."""
    head = model.get_output_embeddings().weight
    return sum(p.ds_numel for p in model.parameters() if p is not head and not p.ds_persist)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:] if word.endswith(".yaml")])

"""What callbacks written for other trainers ask `trainer.accelerator` for: ranks, shares of prompts, generation.

Not accelerate's `Accelerator`: processes and ZeRO-3 are the engine's own. It has what TRL's `LogCompletionsCallback`
and scripts use, under accelerate's names and in accelerate's sense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from engine.cluster import hosts
from engine.models.student import Student


class GatheredStudent:
    """The student to generate with, inside `split_between_processes`, where its parameters are whole.

    Attributes:
        is_gradient_checkpointing: False, so that nobody switches checkpointing off, and on again in another way: the
            student is in evaluation mode, in which there is none.
    """

    is_gradient_checkpointing = False

    def __init__(self, student: Student) -> None:
        self.model, self.device = student.model, student.engine.device
        self.is_whole = False

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`.

        Raises:
            ValueError: where the parameters lie in their partitions.
        """
        if not self.is_whole:
            raise ValueError(
                "model_wrapped.generate: the student's parameters are partitioned over the ranks; generate inside "
                "`with trainer.accelerator.split_between_processes(prompts) as prompts:`, which gathers them"
            )
        return self.model.generate(*args, **kwargs)


class Accelerator:
    """Ranks and the student to generate with, by accelerate's names.

    Attributes:
        state: says that there is no DeepSpeed plugin: nobody but the engine is to gather parameters.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.whole = GatheredStudent(student)
        self.device = student.engine.device
        self.process_index, self.num_processes = dist.get_rank(), dist.get_world_size()
        self.local_process_index = hosts.local_rank()
        self.state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None)
        if self.device.type == "cpu":  # else accelerate's own functions take such a process for the only one
            PartialState(cpu=True)

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_process_index == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print`, on rank 0 of each host."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """All ranks must call."""
        dist.barrier()

    def unwrap_model(self, model: Any, **_: Any) -> GatheredStudent:
        """The student to generate with, whatever wraps it."""
        return self.whole

    @contextmanager
    def split_between_processes(self, inputs: Iterable[Any], apply_padding: bool = False) -> Iterator[list[Any]]:
        """This rank's share of `inputs`, in order; inside the block the student is whole on every rank.

        The last one repeats where `apply_padding` asks for shares of one length. All ranks must call; inside, each
        rank generates at its own pace.
        """
        items, count = list(inputs), self.num_processes
        shares = [items[len(items) * rank // count : len(items) * (rank + 1) // count] for rank in range(count)]
        own = shares[self.process_index]
        if apply_padding and items:
            own = own + [(own or items)[-1]] * (max(map(len, shares)) - len(own))
        with self.student.gathered():
            self.whole.is_whole = True
            try:
                yield own
            finally:
                self.whole.is_whole = False

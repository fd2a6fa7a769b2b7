"""What scripts and callbacks ask of `args` about the process they run in, by transformers' names.

Before the process group is there, the launcher's variables answer; torch is imported where it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

# transformers' names; `passive` is whatever its own logger has.
LOG_LEVELS: Mapping[str, int | None] = MappingProxyType(
    {
        "detail": logging.DEBUG,
        "debug": logging.DEBUG,
        "info": logging.INFO,
        "warning": logging.WARNING,
        "error": logging.ERROR,
        "critical": logging.CRITICAL,
        "passive": None,
    }
)


class Environment:
    """Properties of the process, and a few counts that follow from the configuration."""

    use_cpu: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    save_on_each_node: bool
    log_on_each_node: bool
    log_level: str
    log_level_replica: str
    warmup_ratio: float
    warmup_steps: float
    timeout_s: int

    @property
    def world_size(self) -> int:
        import torch.distributed as dist

        return dist.get_world_size() if _has_group() else int(os.environ.get("WORLD_SIZE", 1))

    @property
    def process_index(self) -> int:
        import torch.distributed as dist

        return dist.get_rank() if _has_group() else int(os.environ.get("RANK", 0))

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def device(self) -> Any:
        """The `torch.device` of this rank."""
        import torch
        from deepspeed.accelerator import get_accelerator

        if self.use_cpu or get_accelerator().device_name() == "cpu":
            return torch.device("cpu")
        return torch.device(get_accelerator().device_name(self.local_process_index))

    @property
    def n_gpu(self) -> int:
        """Accelerators of this process: one, or none on CPU."""
        return 0 if self.device.type == "cpu" else 1

    @property
    def parallel_mode(self) -> Any:
        """transformers' `ParallelMode`."""
        from transformers.training_args import ParallelMode

        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size

    @property
    def should_log(self) -> bool:
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    def get_process_log_level(self) -> int:
        """The level of `logging` that `log_level` names, or `log_level_replica` where `should_log` is false."""
        from transformers.utils import logging as transformers_logging

        level = LOG_LEVELS[self.log_level if self.should_log else self.log_level_replica]
        return transformers_logging.get_verbosity() if level is None else level

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps over which the learning rate rises, of a run of so many."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil((self.warmup_steps or self.warmup_ratio) * num_training_steps)

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """The body runs on the first rank (of each host, where `local`), then on the others.

        All ranks must call where the process group is there; before that it does not wait.
        """
        import torch.distributed as dist

        waits = _has_group() and (self.local_process_index if local else self.process_index) != 0
        if waits:
            dist.barrier()
        try:
            yield
        finally:
            if _has_group() and not waits:
                dist.barrier()


def _has_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()

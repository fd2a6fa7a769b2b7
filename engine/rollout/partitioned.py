"""Completions from a model that stays in its ZeRO-3 partitions: every forward pass fetches it layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from engine.rollout.completer import Completion, Request, Writer
from engine.rollout.decoder import Decoder
from engine.rollout.sampling import Sampling


class PartitionedCompleter:
    """A `Completer` for a model that does not fit on a rank. Ranks make forward passes until none decodes."""

    def __init__(self, writer: Writer, sampling: Sampling, num_slots: int, device: torch.device) -> None:
        self.writer, self.device = writer, device
        self.decoder = Decoder(writer.model, sampling, num_slots, synchroniser=self._any_rank, device=device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.writer.model.eval()
        yield

    def complete(self, requests: list[Request]) -> list[list[Completion]]:
        return self.decoder.decode(requests)

    def _any_rank(self, active: bool) -> bool:
        flag = torch.tensor([active], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

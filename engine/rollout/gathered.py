"""Completions from the whole model on every rank: gathered once, then each rank decodes at its own pace."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from engine.rollout.completer import Completion, Request, Writer
from engine.rollout.decoder import Decoder
from engine.rollout.sampling import Sampling


class GatheredCompleter:
    """A `Completer` that needs memory for the whole model beside its KV cache; no collective per token."""

    def __init__(self, writer: Writer, sampling: Sampling, num_slots: int, device: torch.device) -> None:
        self.writer = writer
        self.decoder = Decoder(writer.model, sampling, num_slots, device=device)

    def ready(self) -> AbstractContextManager[object]:
        return self.writer.gathered()

    def complete(self, requests: list[Request]) -> list[list[Completion]]:
        return self.decoder.decode(requests)

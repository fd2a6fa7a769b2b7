"""Which completer a writer gets: the one that `generation_placement` names, or by free memory.

A further backend is a class like those of `gathered` and `partitioned`, a line in `COMPLETERS`, and its name in
`engine.config.GENERATION_PLACEMENTS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from engine.cluster import hosts
from engine.config import GENERATION_PLACEMENTS, GKDConfig
from engine.rollout.completer import Completer, Writer
from engine.rollout.gathered import GatheredCompleter
from engine.rollout.partitioned import PartitionedCompleter
from engine.rollout.sampling import Sampling
from engine.zero import partitions

logger = logging.getLogger(__name__)

# By what `generation_placement` calls it. Arguments: writer, sampling, sequences at once, device.
COMPLETERS: dict[str, Callable[[Writer, Sampling, int, torch.device], Completer]] = {
    "gathered": GatheredCompleter,
    "partitioned": PartitionedCompleter,
}
if COMPLETERS.keys() != set(GENERATION_PLACEMENTS):
    differing = sorted(COMPLETERS.keys() ^ set(GENERATION_PLACEMENTS))
    raise ImportError(f"COMPLETERS and GENERATION_PLACEMENTS differ: {differing}")


def build_completer(config: GKDConfig, writer: Writer, sampling: Sampling, device: torch.device) -> Completer:
    """The completer for a writer. All ranks must call: the rank with the least free memory decides for all."""
    return COMPLETERS[choose(config, writer.model, device)](writer, sampling, config.generation_rows, device)


def choose(config: GKDConfig, model: nn.Module, device: torch.device) -> str:
    """A key of `COMPLETERS`. All ranks must call."""
    named = config.generation_placement
    if named in ("auto", "partitioned") and not any(map(partitions.is_partitioned, model.parameters())):
        return "gathered"  # it is whole already
    if named != "auto":
        return named
    needed = 1.1 * (parameter_bytes(model) + cache_bytes(model, config))
    free = torch.tensor([free_memory_bytes()], dtype=torch.float64, device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    chosen = "gathered" if needed < free.item() else "partitioned"
    if dist.get_rank() == 0:
        logger.info(
            "generation_placement auto: %s; whole model and KV cache need %.2f GiB, the fullest rank has %.2f",
            chosen,
            needed / 2**30,
            free.item() / 2**30,
        )
    return chosen


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the whole model in its compute dtype."""
    return sum(partitions.full_shape(p).numel() * p.element_size() for p in model.parameters())


def cache_bytes(model: nn.Module, config: GKDConfig) -> int:
    """Bytes of the KV cache when every sequence is as long as it can get."""
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_size * next(model.parameters()).element_size()
    return config.generation_rows * (config.max_length + config.max_new_tokens) * per_token


def free_memory_bytes() -> float:
    """Memory that this rank may still take: the accelerator's, or its share of the host's."""
    if get_accelerator().device_name() == "cpu":
        return psutil.virtual_memory().available / hosts.ranks_per_node()
    return get_accelerator().available_memory()

"""Loading a partitioned model from safetensors: each rank reads its own piece of each tensor, and nothing else.

transformers' loader under ZeRO-3 (5.23) lets rank 0 read every tensor whole and scatters it. Where the names in the
files are the model's own, which holds for all dense families, a rank can read just the rows that its piece covers.
Mixture-of-experts checkpoints whose experts transformers fuses while loading go through its own loader.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from engine.cluster.agreement import raise_together
from engine.config.source import ModelSource
from engine.models.weights import (
    HARMLESS,
    TensorFiles,
    check_complete,
    find_tensor_files,
    persistent_buffers,
)
from engine.zero import partitions

logger = logging.getLogger(__name__)


def load_partitioned(
    source: ModelSource, auto_class: Any, config: Any, settings: dict[str, Any], **options: Any
) -> nn.Module | None:
    """The model of `config` under ZeRO-3 `settings`, its pieces read from the files. All ranks must call.

    `auto_class` is the transformers class that builds it.

    Returns None, having read nothing, where the files' names are not the model's: transformers must convert them.

    Raises:
        ValueError: for tensors of another shape than the model's, and tied ones that differ.
    """
    name, files = source.name, find_tensor_files(source)
    if files is None or not partitions.can_fill_pieces(settings):
        return None
    with no_init_weights(), prevent_arange_dtype_change(), partitions.partitioned_construction(settings):
        model = auto_class.from_config(config, **options)
    model.tie_weights()
    tensors = dict(model.named_parameters()) | persistent_buffers(model)
    found = {own: files.find(own, model.base_model_prefix) for own in tensors}
    if None in found.values():
        logger.info("%s: its files lack names of the model's; transformers' own loader takes over", name)
        return None
    names = {own: in_file for own, in_file in found.items() if in_file is not None}
    shapes = {own: partitions.full_shape(tensor) for own, tensor in tensors.items()}
    misshapen = [
        (own, files.shapes[in_file], shapes[own])
        for own, in_file in names.items()
        if files.shapes[in_file] != shapes[own]
    ]
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if target in files.shapes}
    check_complete(name, (), misshapen, _unexpected(model, files.shapes.keys() - set(names.values()) - tied.keys()))
    for own, tensor in tensors.items():
        if partitions.is_partitioned(tensor):
            partitions.fill_piece(tensor, files.read_elements(names[own], *partitions.piece_span(tensor)))
        else:  # a buffer
            tensor.copy_(files.read_elements(names[own], 0, tensor.numel()).view(tensor.shape))
    raise_together(_find_untied(name, files, model, names, tied))
    return model


def _unexpected(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of the names that neither the model nor an older release of it has a use for."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in (HARMLESS, *ignored))]


def _find_untied(
    name: str, files: TensorFiles, model: nn.Module, names: dict[str, str], tied: dict[str, str]
) -> str | None:
    """What is wrong where the files hold two different tensors for weights that the configuration ties."""
    for target, source in tied.items():
        span = partitions.piece_span(model.get_parameter(source))
        if files.shapes[target] != files.shapes[names[source]] or not torch.equal(
            files.read_elements(target, *span), files.read_elements(names[source], *span)
        ):
            return (
                f"model {name!r}: config.json ties {target} to {source}, and the files hold two different tensors: "
                "set `tie_word_embeddings` to false in config.json"
            )
    return None

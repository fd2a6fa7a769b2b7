"""Loading a partitioned model from safetensors: each rank reads its own piece of each tensor, and nothing else.

transformers' loader under ZeRO-3 (5.23) lets rank 0 read every tensor whole and scatters it. Where the names in the
files are the model's own, which holds for all dense families, a rank can read just the rows that its piece covers.
Mixture-of-experts checkpoints whose experts transformers fuses while loading go through its own loader.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from engine import zero

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a model folder, by name, read in rows."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            self._files = json.loads((folder / INDEX).read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        self._folder = folder

    def find(self, name: str, prefix: str) -> str | None:
        """The name that a parameter has in the files: its own, or without the base model's prefix."""
        for candidate in (name, name.removeprefix(prefix + ".")):
            if candidate in self._files:
                return candidate
        return None

    def read_elements(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor, in the file's dtype; only the rows that hold them are read.

        Raises:
            ValueError: where the file's tensor has another shape.
        """
        path = self._folder / self._files[name]
        with safe_open(path, "pt") as file:  # opened anew each time: the pages of a mapped file count as this process's
            tensor = file.get_slice(name)
            if list(tensor.get_shape()) != list(shape):
                raise ValueError(f"{path}: {name} has shape {tensor.get_shape()}, the model {list(shape)}")
            width = shape[1:].numel()
            first, last = start // width, -(-stop // width)
            return tensor[first:last].flatten()[start - first * width : stop - first * width]


def find_tensor_files(name: str) -> TensorFiles | None:
    """The safetensors files of a local folder or a hub model; None where it has none."""
    folder = (
        Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX]))
    )
    if not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        return None
    return TensorFiles(folder)


def load_partitioned(name: str, config: Any, settings: dict[str, Any], **options: Any) -> nn.Module | None:
    """The causal LM of `config` under ZeRO-3 `settings`, its pieces read from the files. All ranks must call.

    Returns None, having read nothing, where the files' names are not the model's: transformers must convert them.

    Raises:
        ValueError: for a tensor of another shape than the model's.
    """
    files = find_tensor_files(name)
    if files is None or not zero.can_fill_pieces(settings):
        return None
    with no_init_weights(), prevent_arange_dtype_change(), zero.partitioned_construction(settings):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    names: dict[str, str] = {}
    for param_name, _ in model.named_parameters():
        found = files.find(param_name, model.base_model_prefix)
        if found is None:
            logger.info("%s: its files have no %s; transformers' own loader takes over", name, param_name)
            return None
        names[param_name] = found
    for param_name, param in model.named_parameters():
        start, stop = zero.piece_span(param)
        piece = files.read_elements(names[param_name], param.ds_shape, start, stop)
        zero.fill_piece(param, piece)
    return model

"""The weight files of a model folder: readable, whole, and holding every tensor that the model has.

Headers alone are read, so that a missing shard or a file that was cut short is an error before anything loads. What a
loader could not find is an error too: a tensor that no file has would stay at random numbers, and a teacher without
its head gives figures that look like any others.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from engine.config.source import ModelSource

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHOWN = 3  # names in an error
# Written by older releases of transformers and PyTorch, and computed by newer ones.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$|\.attn\.bias$")


class TensorFiles:
    """The tensors of a folder's safetensors files, by name, read in rows.

    Attributes:
        shapes: the shape of every tensor.

    Raises:
        ValueError: for a file that is missing or cut short, and a tensor that its file does not have.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = read_index(folder / INDEX) if (folder / INDEX).is_file() else None
        headers = {name: read_header(folder / name) for name in (sorted(set(files.values())) if files else [SINGLE])}
        self._files = files or dict.fromkeys(headers[SINGLE], SINGLE)
        lost = sorted(name for name, file in self._files.items() if name not in headers[file])
        if lost:
            raise ValueError(f"{folder / INDEX}: {listed(lost)} not in the files that it names")
        self.shapes = {name: torch.Size(headers[file][name]) for name, file in self._files.items()}

    def find(self, name: str, prefix: str) -> str | None:
        """The name that a tensor has in the files: its own, or without the base model's prefix."""
        for candidate in (name, name.removeprefix(prefix + ".")):
            if candidate in self._files:
                return candidate
        return None

    def read_elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a flattened tensor, in the file's dtype; only the rows that hold them are read."""
        with safe_open(self._folder / self._files[name], "pt") as file:
            # opened anew each time: the pages of a mapped file count as this process's
            if not self.shapes[name]:
                return file.get_tensor(name).flatten()[start:stop]
            width = self.shapes[name][1:].numel()
            first, last = start // width, -(-stop // width)
            return file.get_slice(name)[first:last].flatten()[start - first * width : stop - first * width]


def read_index(path: Path) -> dict[str, str]:
    """File of each tensor, as an index tells; ValueError where a file is missing."""
    try:
        files = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not an index of weights ({type(error).__name__}: {error})") from error
    missing = sorted(file for file in set(files.values()) if not (path.parent / file).is_file())
    if missing:
        raise ValueError(f"{path} names {listed(missing)}, which the folder does not have: copy it again")
    return files


def read_header(path: Path) -> dict[str, list[int]]:
    """Shapes of a safetensors file's tensors; ValueError where the file is something else or not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} ({size} bytes) is no safetensors file, or is cut short: copy it again")
    header.pop("__metadata__", None)
    whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != whole:
        raise ValueError(f"{path} is damaged: it has {size} bytes instead of {whole}; copy it again")
    return {name: entry["shape"] for name, entry in header.items()}


def weight_folder(source: ModelSource) -> Path:
    """The local folder of a model; of a hub model, its place in the cache, with the weights downloaded."""
    folder = Path(source.name)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(source.name, allow_patterns=["*.safetensors", "*.index.json"], **source.of_hub))


def find_tensor_files(source: ModelSource) -> TensorFiles | None:
    """The safetensors files of a local folder or a hub model; None where it has none. ValueError as `TensorFiles`."""
    return tensor_files_in(weight_folder(source))


def tensor_files_in(folder: Path) -> TensorFiles | None:
    return TensorFiles(folder) if (folder / INDEX).is_file() or (folder / SINGLE).is_file() else None


def check_files(name: str, folder: Path) -> None:
    """Check that the weight files of model `name` are in its folder and whole, by their headers.

    Raises:
        ValueError: names the file.
    """
    if tensor_files_in(folder) is not None:
        return
    if (folder / TORCH_INDEX).is_file():
        files = sorted({folder / file for file in read_index(folder / TORCH_INDEX).values()})
    else:
        files = sorted(folder.glob("*.bin")) or sorted(folder.glob("*.safetensors"))
    if not files and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"model {name!r} has no weights: neither {SINGLE} nor {TORCH_SINGLE} (nor shards of one)")
    for file in files:
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK"  # PyTorch's format; its directory is at the end
        if file.stat().st_size == 0 or (is_zip and not zipfile.is_zipfile(file)):
            raise ValueError(f"{file} ({file.stat().st_size} bytes) is cut short: copy it again")


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint holds beside the parameters."""
    found = {}
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{module_name}.{name}".lstrip(".")] = buffer
    return found


def check_complete(
    name: str, missing: Collection[str], misshapen: Collection[tuple], unexpected: Collection[str]
) -> None:
    """Check that every tensor of a model was in its files; a warning where the files have more.

    Args:
        missing: tensors that no file has; tied ones left out.
        misshapen: (name, shape in the file, shape in the model).

    Raises:
        ValueError: lists the first of them.
    """
    advice = "these would be random numbers. Is it another architecture's checkpoint, or one saved with prefixed names?"
    if missing:
        more = f" They do have {listed(unexpected)}, which the model does not know." if unexpected else ""
        raise ValueError(f"model {name!r}: its files lack {listed(missing)}; {advice}{more}")
    if misshapen:
        shown = [f"{key} (file {list(file)}, model {list(own)})" for key, file, own in sorted(misshapen)]
        raise ValueError(f"model {name!r}: tensors of another shape than config.json says: {listed(shown)}")
    if unexpected:
        logger.warning("model %r: its files have %s, which the model does not use", name, listed(unexpected))


def listed(names: Collection[str]) -> str:
    """The first few names and how many there are in all."""
    names = sorted(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest

"""Export: a Hugging Face folder from the live student or from a checkpoint, one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint.manifest import flush_file, holds_only_model, list_files, publish, verify
from engine.checkpoint.parts import save_parts
from engine.cluster.agreement import all_or_none
from engine.errors import CheckpointError
from engine.models.weights import persistent_buffers
from engine.zero import partitions

SHARD_BYTES = 4 * 2**30
STUDENT_PREFIX = "causal_lm."  # of `HiddenStates`, under which the engine knows the student's parameters


def export_student(model: nn.Module, parts: list[Any], out: Path) -> None:
    """Write the live student, in its compute dtype, with its `parts`, beside its place, and rename it.

    All ranks must call.

    Raises:
        CheckpointError: where it cannot be written; an earlier export stays as it was.
    """
    all_or_none(f"{out} cannot be written", out.parent, lambda: write_student(model, parts, beside(out)))


def write_student(model: nn.Module, parts: list[Any], place: AbstractContextManager[Path]) -> None:
    """Write the live student into the folder that `place` gives rank 0, which alone enters it. All ranks must call.

    Raises:
        CheckpointError, OSError: on rank 0 alone, where it cannot be written.
    """
    tensors = _gathered_tensors(model)
    try:
        if dist.get_rank() == 0:
            with place as folder:
                write_model_folder(tensors, parts, folder)
    finally:
        for _ in tensors:  # what is gathered, every rank gathers, also where rank 0 has failed
            pass


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `out` when the block is through, and goes where it fails.

    Weights of an earlier export go with it; what else lies there comes along.
    """
    hidden = out.with_name(f".writing_{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        for old in out.iterdir() if out.is_dir() else ():
            if not (hidden / old.name).exists() and not old.match("model*.safetensors*"):
                copy = shutil.copytree if old.is_dir() else shutil.copy2
                copy(old, hidden / old.name)
        for name in list_files(hidden):
            flush_file(hidden / name)
        publish(hidden, out)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def move_model(source: Path, folder: Path) -> None:
    """Move an export's files into a folder that stays where it is, in place of those of an earlier model."""
    new = {path.name for path in source.iterdir()}
    for old in folder.glob("model*.safetensors*"):
        if old.name not in new:
            old.unlink()
    for path in source.iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    source.rmdir()


def _gathered_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole value of every tensor of a checkpoint, parameters gathered one at a time."""
    for name, param in model.named_parameters():
        with partitions.gathered([param]):
            value = param.detach().cpu().clone() if dist.get_rank() == 0 else param.detach()[:0]
        yield name, value
    for name, buffer in persistent_buffers(model).items():  # whole on every rank
        yield name, buffer.detach().cpu().clone()


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Write the student of a checkpoint, from its fp32 master weights. Needs no process group.

    Raises:
        ValueError: where the folder is not a whole checkpoint of this engine, or `out` holds something.
        CheckpointError: where `out` cannot be written; nothing is left of it then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder: name another one, or remove it")
    problems = verify(checkpoint)
    if problems:
        raise ValueError(f"{checkpoint} cannot be exported: {'; '.join(problems)}")
    if holds_only_model(checkpoint):
        raise ValueError(f"{checkpoint} is a Hugging Face folder already (save_only_model): use it as it is")
    try:
        with beside(out) as hidden:
            _write_checkpoints_student(checkpoint, hidden, dtype)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error


def _write_checkpoints_student(checkpoint: Path, out: Path, dtype: torch.dtype | None) -> None:
    lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
    seen: set[int] = set()
    names = []
    for name, value in lazy.items():  # tied weights appear under every name that shares them
        if id(value) not in seen:
            names.append(name)
        seen.add(id(value))
    tensors = ((name.removeprefix(STUDENT_PREFIX), lazy[name].contiguous()) for name in names)
    if dtype is not None:
        tensors = ((name, value.to(dtype)) for name, value in tensors)
    write_model_folder(tensors, [], out)
    shutil.copytree(checkpoint / "hf", out, dirs_exist_ok=True)
    if dtype is not None:
        config_path = out / "config.json"
        settings = json.loads(config_path.read_text())
        settings["dtype"] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(settings, indent=2))


def write_model_folder(tensors: Iterable[tuple[str, torch.Tensor]], parts: list[Any], out: Path) -> None:
    """safetensors shards with their index, and `parts` (config, tokenizer) by their `save_pretrained`."""
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        if waiting:
            file = out / f"model-{len(shards) + 1:05d}.safetensors"
            try:
                save_file(waiting, file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk among them
                raise CheckpointError(f"{file.name}: {error}") from error
            shards.append(list(waiting))
            waiting.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and sum(t.numel() * t.element_size() for t in waiting.values()) + size > SHARD_BYTES:
            flush()
        waiting[name] = tensor.contiguous()
        total_bytes += size
    flush()
    _name_shards(out, shards, total_bytes)
    save_parts(parts, out)


def _name_shards(out: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Hugging Face's names: one file is `model.safetensors`, several carry their count and have an index."""
    if len(shards) == 1:
        (out / "model-00001.safetensors").rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (out / f"model-{number:05d}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

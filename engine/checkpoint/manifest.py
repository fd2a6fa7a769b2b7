"""Manifests: what a complete folder holds, with sizes and checksums, and writes that a crash cannot cut in half.

Knows files and ranks; nothing of models or of what the files mean. The files are on storage that all ranks see. A
process without a process group is the only rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.cluster.agreement import union

MANIFEST = "manifest.json"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none, or it is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not JSON, not UTF-8
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def holds_only_model(path: Path) -> bool:
    """Whether a checkpoint is a Hugging Face folder without the state of training (`save_only_model`)."""
    manifest = read_manifest(path)
    return manifest is not None and manifest.get("only_model", False)


def verify(path: Path) -> list[str]:
    """What is wrong with a folder, empty if nothing. All ranks must call: each checks a share of the files."""
    if not (path / MANIFEST).is_file():
        return [f"{path} is not a complete checkpoint: no {MANIFEST}"]
    manifest = read_manifest(path)
    if manifest is None:
        return [f"{path / MANIFEST} is damaged"]
    problems = {}
    for name in share(sorted(manifest["files"])):
        size, digest = manifest["files"][name]
        if not (path / name).is_file():
            problems[name] = f"{name} is missing"
        elif (path / name).stat().st_size != size:
            problems[name] = f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
        elif file_digest(path / name) != digest:
            problems[name] = f"{name} has changed since it was written"
    return list(union(problems).values())


def list_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def share(names: list[str]) -> list[str]:
    """This rank's part of a list that is the same on all ranks."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def flushed_digests(folder: Path, names: list[str]) -> dict[str, list]:
    """Size and digest of files, each flushed to disk first."""
    result = {}
    for name in names:
        flush_file(folder / name)
        result[name] = [(folder / name).stat().st_size, file_digest(folder / name)]
    return result


def file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Replace a small file in one step: it holds the old text or the new, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def publish(hidden: Path, final: Path) -> None:
    """Give a complete folder its name; one of that name from an earlier run makes way."""
    for folder in [hidden, *(p for p in hidden.rglob("*") if p.is_dir())]:
        flush_folder(folder)
    replaced = final.with_name(f".replaced_{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(hidden, final)
    flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

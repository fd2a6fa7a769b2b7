"""Checkpoints: DeepSpeed's own format, visible only when complete, with a manifest that tells.

A checkpoint is written into a hidden folder, every rank's files are flushed and hashed, the manifest is written last,
the folder is renamed, and only then does `latest` move and an old checkpoint go. A crash at any instant leaves the
newest complete one loadable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from engine.batch import Sample
from engine.config import GKDConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps; all that a resume needs beside weights and optimizer.

    Attributes:
        batches: global batches taken from the data so far; the next one has this number.
        tokens: response tokens trained on so far, over all ranks.
        run_id: the tracker's id of the run.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    run_id: str | None = None


class Checkpoints:
    """The checkpoints of one run folder. All ranks must call its methods."""

    def __init__(self, config: GKDConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / "checkpoints"

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        state: TrainState,
        model_parts: list[Any],
        rollouts: list[list[Sample]] | None,
    ) -> Path:
        """Write `step_<N>`. `model_parts` (config, tokenizer: whatever has `save_pretrained`) go into its `hf` folder,
        rollouts that later steps still train on into one file per rank."""
        name = f"step_{state.step}"
        hidden = self.folder / f".saving_{name}"
        if dist.get_rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
            (hidden / "hf").mkdir(parents=True)
            for part in model_parts:
                part.save_pretrained(hidden / "hf")
        dist.barrier()
        record = dataclasses.asdict(state) | {"world_size": dist.get_world_size(), "config": self.config.to_dict()}
        engine.save_checkpoint(
            str(self.folder), tag=hidden.name, client_state={"train_state": record}, save_latest=False
        )
        if rollouts is not None:
            rows = [[dataclasses.asdict(sample) for sample in batch] for batch in rollouts]
            (hidden / f"rollouts_{dist.get_rank()}.json").write_text(json.dumps(rows))
        dist.barrier()
        digests = _merge(_digests(hidden, _share(list_files(hidden))))
        if dist.get_rank() == 0:
            write_durably(hidden / MANIFEST, json.dumps({**record, "files": digests}, indent=1, default=str))
            _publish(hidden, self.folder / name)
            write_durably(self.folder / "latest", name)
            self._prune(keep=name)
        dist.barrier()
        return self.folder / name

    def _prune(self, keep: str) -> None:
        if self.config.save_total_limit is None:
            return
        for old in complete_checkpoints(self.folder)[self.config.save_total_limit :]:
            if old.name != keep:
                shutil.rmtree(old)

    def find(self) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` asks for, verified; None for a fresh start.

        Raises:
            ValueError: where the named one is missing or damaged; the text names the files.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return None
        if wanted != "auto":
            problems = verify(Path(wanted))
            if problems:
                raise ValueError(f"resume_from_checkpoint={wanted!r}: {'; '.join(problems)}")
            return Path(wanted)
        for path in complete_checkpoints(self.folder):
            problems = verify(path)
            if not problems:
                return path
            if dist.get_rank() == 0:
                logger.warning("checkpoint %s is damaged and skipped: %s", path, "; ".join(problems))
        return None

    def load(self, path: Path, engine: deepspeed.DeepSpeedEngine) -> TrainState:
        """Weights, optimizer and schedule into the engine, which must be freshly built.

        Raises:
            ValueError: where it was written at another world size.
        """
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["world_size"] != dist.get_world_size():
            raise ValueError(
                f"{path} was written by {manifest['world_size']} ranks and this run has {dist.get_world_size()}: "
                "use as many"
            )
        loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise ValueError(f"{path}: DeepSpeed could not load it")
        record = client_state["train_state"]
        return TrainState(**{f.name: record[f.name] for f in dataclasses.fields(TrainState)})

    def load_rollouts(self, path: Path) -> list[list[Sample]] | None:
        """This rank's rollouts, where the checkpoint fell between two steps that share them."""
        file = path / f"rollouts_{dist.get_rank()}.json"
        if not file.exists():
            return None
        return [[Sample(**row) for row in batch] for batch in json.loads(file.read_text())]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, newest first."""
    found = [p for p in folder.glob("step_*") if (p / MANIFEST).is_file() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, empty if nothing: each rank checks a share of the files."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return [f"{path} is not a complete checkpoint: no {MANIFEST}"]
    try:
        files: dict[str, list] = json.loads(manifest_path.read_text())["files"]
    except (json.JSONDecodeError, KeyError):
        return [f"{manifest_path} is damaged"]
    problems = {}
    for name in _share(sorted(files)):
        size, digest = files[name]
        if not (path / name).is_file():
            problems[name] = f"{name} is missing"
        elif (path / name).stat().st_size != size:
            problems[name] = f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
        elif _digest(path / name) != digest:
            problems[name] = f"{name} has changed since it was written"
    return list(_merge(problems).values())


def list_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _merge(own: dict[str, Any]) -> dict[str, Any]:
    """Union of every rank's dict, sorted by key."""
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return dict(sorted((key, value) for one in everyone for key, value in one.items()))


def _digests(folder: Path, names: list[str]) -> dict[str, list]:
    """Size and digest of files, each flushed to disk first."""
    result = {}
    for name in names:
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
        result[name] = [(folder / name).stat().st_size, _digest(folder / name)]
    return result


def _digest(path: Path) -> str:
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


def _publish(hidden: Path, final: Path) -> None:
    """Give a complete folder its name; one of that name from an earlier run makes way."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(hidden, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

"""Elastic resume: a checkpoint taken up at another world size, or with other ZeRO offload.

ZeRO's files hold one rank's pieces, so they fit only the layout that wrote them. DeepSpeed's universal format holds
whole parameters and optimizer states instead; rank 0 converts to it once, in a process of its own, while the others
wait. The data order and the seeds of samples know only places in the global batch, which stays the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint.manifest import MANIFEST
from engine.cluster.agreement import from_main
from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.data.order import copy_indices, places_of_rank
from engine.errors import CheckpointError
from engine.zero.settings import read_deepspeed

logger = logging.getLogger(__name__)

UNIVERSAL_TAG = "state"  # the folder inside a converted copy that holds DeepSpeed's files
ADAMS = ("torch.optim.AdamW", "AdamW", "Adam", "torch.optim.adamw.AdamW", "torch.optim.adam.Adam")
POLL_S = 0.5
MAX_WORKERS = 8  # processes that convert


def zero_layout(config: GKDConfig, world_size: int) -> dict[str, Any]:
    """What the files of a checkpoint depend on; equal layouts load them as they are."""
    zero = read_deepspeed(config.deepspeed)["zero_optimization"]
    offload = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    return {"world_size": world_size, "bf16": config.bf16, "sub_group_size": zero.get("sub_group_size"), **offload}


def batch_to_keep(config: GKDConfig, path: Path, manifest: dict[str, Any], world_size: int) -> int | None:
    """The `global_batch_size` with which a resumed run's steps are as large as before; None where they are already.

    Raises:
        ValueError: where the ranks cannot share that batch, or the configuration asks for another.
    """
    saved, given = manifest["global_batch_size"], config.global_batch(world_size)
    if given == saved:
        return None
    if config.global_batch_size is not None or world_size == manifest["layout"]["world_size"]:
        raise ValueError(
            f"{path} was trained with {saved} sequences a step, and this configuration gives {given}: "
            f"set global_batch_size={saved}, or start a new run from its export"
        )
    try:
        accumulation = config.with_global_batch(saved).accumulation_steps(world_size)
    except ValueError as error:
        raise ValueError(f"{path} was trained with {saved} sequences a step, which must be kept: {error}") from error
    if dist.get_rank() == 0:
        logger.info("%d sequences a step as before: %d micro-batches on %d ranks", saved, accumulation, world_size)
    return saved


def universal_copy(path: Path, manifest: dict[str, Any], layout: dict[str, Any], folder: Path) -> Path:
    """A copy of a checkpoint in DeepSpeed's universal format under `folder`, converted now unless it is there.

    All ranks must call. Its name holds the manifest's digest, so that another checkpoint is never taken for this one.

    Raises:
        ValueError: where NVMe holds the optimizer states, before or now, or they are no Adam's.
        CheckpointError: where the disk is too small, or DeepSpeed's converter fails.
    """
    # deepspeed 0.19.8 copies NVMe swap files beside the checkpoint as they are, and its converter does not read them.
    if "nvme" in (manifest["layout"]["offload_optimizer"], layout["offload_optimizer"]):
        raise ValueError(
            f"{path} was written with {manifest['layout']} and this run has {layout}: with `offload_optimizer.device`="
            "nvme on either side, resume with the same ranks and offload"
        )
    if manifest.get("optimizer", ADAMS[0]) not in ADAMS:  # deepspeed 0.19.8's converter asks for exp_avg and exp_avg_sq
        raise ValueError(
            f"{path} holds the moments of {manifest['optimizer']}, written with {manifest['layout']}, and this run has "
            f"{layout}: DeepSpeed converts Adam's moments alone; resume with the same ranks, precision and offload"
        )
    digest = hashlib.blake2b((path / MANIFEST).read_bytes(), digest_size=8).hexdigest()
    converted = folder / f".universal_{path.name}_{digest}"
    problem = None
    if dist.get_rank() == 0 and not converted.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        problem = disk_problem(path, manifest, folder)
    if problem := from_main(problem):
        raise CheckpointError(problem)
    convert_together(path, converted)
    return converted


def disk_problem(path: Path, manifest: dict[str, Any], folder: Path) -> str | None:
    """Why there is no room to convert, else None; logs what it takes."""
    sizes = {name: size for name, (size, _) in manifest["files"].items()}
    optimizer = sum(size for name, size in sizes.items() if name.endswith("optim_states.pt"))
    others = sum(sizes.values()) - optimizer
    kept = optimizer + optimizer // manifest["layout"]["world_size"] + others
    peak = kept + optimizer  # pieces are written out before they are merged
    free = shutil.disk_usage(folder).free
    need = f"converting {path} takes {peak / 2**30:.2f} GiB under {folder}"
    logger.info("%s and keeps %.2f GiB until the next checkpoint; %.2f GiB are free", need, kept / 2**30, free / 2**30)
    return f"{need}, and only {free / 2**30:.2f} GiB are free" if free < peak else None


def convert_together(path: Path, converted: Path) -> None:
    """Rank 0 converts; all ranks meet every `POLL_S`, however long it takes, so that no collective times out."""
    process = log = None
    working = converted.with_name(f"{converted.name}.{os.getpid()}.tmp")
    if dist.get_rank() == 0 and not converted.is_dir():
        for stale in converted.parent.glob(".universal_*"):
            shutil.rmtree(stale)
        working.mkdir(parents=True)
        workers = str(max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 2)))
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(path)]
        command += ["--output_folder", str(working / UNIVERSAL_TAG)]
        command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
        log = open(working / "convert.log", "w")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    while (status := from_main(process.poll() if process is not None else 0)) is None:
        time.sleep(POLL_S)
    if log is not None:
        log.close()
    if process is not None and status == 0:
        os.replace(working, converted)
    dist.barrier()
    if status != 0:
        raise CheckpointError(f"{path} could not be converted to DeepSpeed's universal format: {working}/convert.log")


def remove_universal_copies(folder: Path) -> None:
    """A newer checkpoint makes them useless."""
    for copy in folder.glob(".universal_*"):
        shutil.rmtree(copy)


def rollouts_of_rank(path: Path, config: GKDConfig, rank: int, world_size: int) -> list[list[Sample]] | None:
    """This rank's share of the rollouts that a checkpoint holds, whatever ranks wrote them; None where it has none.

    A prompt is at the rank that `places_of_rank` gives its row to, as in `StepData`, and its copies stay with it.
    """
    files = sorted(path.glob("rollouts_*.json"))
    if not files:
        return None
    samples = {row["index"]: Sample(**row) for file in files for batch in json.loads(file.read_text()) for row in batch}
    size, copies = config.per_device_train_batch_size, config.num_generations
    batches = places_of_rank(len(samples) // copies, rank, world_size, size)
    return [[samples[i] for place in places for i in copy_indices(place, copies)] for places in batches]

"""Is the cluster fit for this run? What every rank must have alike, and what hosts need: links, disk, folder, clock.

`same_setup` and `same_data` are the first step of every job, before a model loads. `check_cluster` is the command
`python -m engine check`, run under the job's own launcher. Whatever is wrong is an error that names ranks and hosts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from engine.cluster import hosts
from engine.cluster.agreement import differences, from_main, gather, merge_problems, require_same, together
from engine.config import GKDConfig
from engine.config.source import student_source
from engine.data.sources import fingerprint, load_rows
from engine.models.backbone import count_parameters
from engine.tracking.tracker import package_versions
from engine.zero.settings import read_deepspeed

T = TypeVar("T")

VISIBLE_WITHIN_S = 10  # network file systems show a new file to other hosts after seconds
CLOCK_LIMIT_S = 2.0
PAYLOAD_BYTES = {"cpu": 8 * 2**20}
ACCELERATOR_PAYLOAD_BYTES = 256 * 2**20
ROUNDS = 5
CHECKPOINT_BYTES = 12  # per parameter: fp32 master weight and two moments


def describe_setup(config: GKDConfig) -> dict[str, str]:
    """What must be alike on every rank, by name: versions, and the configuration with the files it names."""
    versions = package_versions()
    if get_accelerator().communication_backend_name() == "nccl":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    record = {"configuration": config.to_dict(), "deepspeed": read_deepspeed(config.deepspeed)}
    if config.teacher_deepspeed is not None:
        record["teacher_deepspeed"] = read_deepspeed(config.teacher_deepspeed, "teacher_deepspeed")
    text = json.dumps(record, sort_keys=True, default=str)
    return versions | {"configuration": hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}


def same_setup(config: GKDConfig, writes: bool) -> None:
    """Versions and configuration are alike, and a run that writes has one folder. All ranks must call.

    Raises:
        ValueError: for a difference; the text names ranks and hosts.
    """
    require_same(together(lambda: describe_setup(config)))
    if writes:
        require_shared(Path(config.output_dir))


def same_data(fingerprints: dict[str, str]) -> None:
    """The rows are alike, by split. All ranks must call; ValueError as `same_setup`."""
    require_same({f"dataset split {split}": digest for split, digest in fingerprints.items()})


def require_shared(folder: Path) -> None:
    """Raise ValueError where a host does not see what rank 0 writes into the run folder. All ranks must call."""
    where = gather(hosts.host_name())
    if len(set(where)) == 1:
        return
    witness, word = folder / ".shared", str(time.time_ns())

    def write() -> str:
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                witness.write_text(word)
            except OSError as error:
                raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error}") from error
        return word

    def see(expected: str) -> None:
        end_s = time.monotonic() + VISIBLE_WITHIN_S
        while not witness.is_file() or witness.read_text() != expected:
            if time.monotonic() > end_s:
                raise ValueError(
                    f"output_dir={str(folder)!r} is not shared: what rank 0 writes there on {where[0]} does not show. "
                    "Checkpoints need a folder that every host mounts"
                )
            time.sleep(hosts.POLL_S)

    expected = from_main(together(write))
    together(lambda: see(expected))
    if dist.get_rank() == 0:
        witness.unlink()


def check_cluster(config: GKDConfig, device: torch.device) -> list[str]:
    """Print what there is, on rank 0, and return what is wrong with it. All ranks must call."""
    where = gather(hosts.host_name())
    problems: list[str] = []
    with hosts.host_by_host(config.prepare_timeout_s):
        found = _attempt(problems, lambda: fingerprint(load_rows(config, config.dataset_train_split)))
        num_parameters = _attempt(problems, lambda: count_parameters(student_source(config))) or 0
    record = _attempt(problems, lambda: describe_setup(config)) or {}
    record |= {"device": describe_device(), "dataset": found or "unreadable"}
    records = gather(record)
    problems = merge_problems(where, gather(problems))
    problems += differences(records, where)
    needed_bytes = num_parameters * CHECKPOINT_BYTES
    if dist.get_rank() == 0:
        print(f"{len(where)} ranks: {hosts.by_host(dict(enumerate(where)))}")
        print("\n".join(f"{name:<14}{value}" for name, value in records[0].items()))
    problems += report_disk(Path(config.output_dir), needed_bytes, where)
    problems += report_clocks(where)
    try:
        require_shared(Path(config.output_dir))
    except ValueError as error:
        problems.append(str(error))
    report_bandwidth(where, device)
    return problems


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    """The action's result; its ValueError joins the problems, so that the rest is still looked at."""
    try:
        return action()
    except ValueError as error:
        problems.append(str(error))
        return None


def describe_device() -> str:
    accelerator = get_accelerator()
    return "cpu" if accelerator.device_name() == "cpu" else torch.cuda.get_device_name(accelerator.current_device())


def report_disk(folder: Path, needed_bytes: int, where: list[str]) -> list[str]:
    """Free space where checkpoints go, seen from each host, against the size of one checkpoint."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = dict(zip(where, gather(shutil.disk_usage(existing).free), strict=True))
    if dist.get_rank() == 0:
        places = ", ".join(f"{num_bytes / 1e9:.1f} GB on {host}" for host, num_bytes in free.items())
        print(f"{'disk':<14}a checkpoint takes {needed_bytes / 1e9:.3g} GB; free: {places}")
    return [
        f"{host} has {num_bytes / 1e9:.3g} GB free for output_dir={str(folder)!r}, and a checkpoint takes "
        f"{needed_bytes / 1e9:.3g} GB"
        for host, num_bytes in free.items()
        if num_bytes < needed_bytes
    ]


def report_clocks(where: list[str]) -> list[str]:
    """How far the hosts' clocks stand from rank 0's."""
    dist.barrier()
    times = gather(time.time())
    ahead = {host: moment - times[0] for host, moment in reversed(list(zip(where, times, strict=True)))}
    if dist.get_rank() == 0:
        print(f"{'clocks':<14}{max(map(abs, ahead.values())) * 1e3:.0f} ms apart, the reading included")
    return [
        f"the clock of {host} is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} that of {where[0]}"
        for host, apart in ahead.items()
        if abs(apart) > CLOCK_LIMIT_S
    ]


def report_bandwidth(where: list[str], device: torch.device) -> None:
    """All-reduce inside each host, and between hosts among ranks of the same place. All ranks must call."""
    members = {host: [r for r, own in enumerate(where) if own == host] for host in where}
    inside = list(members.values())
    sizes = {len(ranks) for ranks in inside}
    across = [list(ranks) for ranks in zip(*inside, strict=True)] if len(sizes) == 1 and len(inside) > 1 else []
    payload_bytes = PAYLOAD_BYTES.get(device.type, ACCELERATOR_PAYLOAD_BYTES)
    for name, groups in (("inside hosts", inside), ("across hosts", across)):
        rates = gather(measure_bandwidth(groups, payload_bytes, device))
        known = {rank: rate for rank, rate in enumerate(rates) if rate is not None}
        if known and dist.get_rank() == 0:
            slowest = min(known, key=lambda rank: known[rank])
            print(
                f"{name:<14}all-reduce of {payload_bytes / 2**20:.0f} MiB at {known[slowest]:.2f} to "
                f"{max(known.values()):.2f} GB/s per rank, slowest rank {slowest} on {where[slowest]}"
            )


def measure_bandwidth(groups: list[list[int]], payload_bytes: int, device: torch.device) -> float | None:
    """GB/s that this rank sends in an all-reduce of its group; None where it has nobody to send to."""
    made = [dist.new_group(ranks) for ranks in groups]
    own = next((i for i, ranks in enumerate(groups) if dist.get_rank() in ranks), None)
    dist.barrier()
    if own is None or len(groups[own]) == 1:
        return None
    payload = torch.zeros(payload_bytes // 4, device=device)
    for round_ in range(ROUNDS + 1):
        if round_ == 1:  # the first opens connections
            get_accelerator().synchronize()
            started_s = time.perf_counter()
        dist.all_reduce(payload, group=made[own])
    get_accelerator().synchronize()
    size = len(groups[own])
    sent_bytes = ROUNDS * payload_bytes * 2 * (size - 1) / size
    return sent_bytes / (time.perf_counter() - started_s) / 1e9

"""Start-up: how this process becomes a rank, whatever started it. Collective from the first line on; no model here."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import enable_full_determinism
from transformers.utils.import_utils import enable_tf32, is_torch_tf32_available

from engine.cluster import hosts
from engine.zero import partitions


def init_distributed(timeout_s: int) -> torch.device:
    """Join the process group and return this rank's device. Plain `python` becomes a world of one.

    `deepspeed`, `torchrun` and Slurm's or MPI's wrappers set the variables; without them DeepSpeed would go looking
    for MPI.
    """
    if "RANK" not in os.environ:
        started = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        if started > 1:
            raise ValueError(
                f"srun or mpirun started {started} processes and none knows its rank: put launch/rank.sh before "
                "`python -m engine`, as launch/slurm.sbatch and launch/mpi.sh do"
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    if get_accelerator().device_name() == "cpu":
        partitions.skip_shared_memory_build()
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that share cores with each other's threads crawl
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // hosts.ranks_per_node()))
    partitions.set_default_timeout(timeout_s)
    local_rank = hosts.local_rank()
    get_accelerator().set_device(local_rank)
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name()
        join_world(backend if backend != "ccl" else "gloo", timeout_s)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), timeout=timedelta(seconds=timeout_s), verbose=False)
    hosts.introduce()
    atexit.register(_close)
    return torch.device(
        get_accelerator().device_name(local_rank) if get_accelerator().device_name() != "cpu" else "cpu"
    )


def set_numerics(use_cpu: bool, tf32: bool | None, full_determinism: bool, seed: int) -> None:
    """Device and kernels that a run asks for, in this process.

    Raises:
        ValueError: where ranks have met on another accelerator by now, or it has no TF32.
    """
    name = get_accelerator().device_name()
    if use_cpu and name != "cpu":
        if dist.is_initialized():
            raise ValueError(
                f"use_cpu=true, and this process is in a group on {name}: set DS_ACCELERATOR=cpu in the environment"
            )
        set_accelerator(CPU_Accelerator())  # deepspeed chose another when it was imported
    if tf32 and not is_torch_tf32_available():
        raise ValueError("tf32=true: this device has no TF32 (an NVIDIA GPU of the Ampere generation or newer has)")
    if tf32 is not None and is_torch_tf32_available():
        enable_tf32(tf32)
    if full_determinism:
        enable_full_determinism(seed)


def _close() -> None:
    """End gloo's threads before the interpreter does: a script that ends while one runs would abort, now and then.

    Not after an exception, where a rank would wait for others that do not come.
    """
    if dist.is_initialized() and "last_value" not in vars(sys):
        dist.destroy_process_group()


def join_world(backend: str, timeout_s: int) -> None:
    """Start torch's process group over the store at which all ranks have met. All ranks must call.

    Raises:
        ConnectionError: where ranks stay away or cannot connect; the text names ranks and hosts.
    """
    store = hosts.meet(backend, timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )

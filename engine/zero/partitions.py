"""DeepSpeed's ZeRO-3 from the inside, which no other file looks at. Written against deepspeed 0.19.8.

It holds what the rest of the engine needs of ZeRO-3: a parameter's local piece, its gradient partition,
rows of a partitioned matrix, and the parameters gathered for generation. It knows nothing of losses or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import nn
from torch.distributed import distributed_c10d
from torch.optim.lr_scheduler import LambdaLR

from engine.errors import CheckpointError


def skip_shared_memory_build() -> None:
    """Keep deepspeed 0.19.8 from compiling its shared-memory all-reduce when a CPU backend starts: minutes at first,
    and a killed build leaves a lock on which every later run waits. Gloo does the same job."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_default_timeout(timeout_s: int) -> None:
    """Give the groups that DeepSpeed will make the run's timeout. With torch's default (30 min on gloo) a rank would
    wait in them for a stuck one after the world's own has passed."""
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s)


def bound_waits(timeout_s: int) -> None:
    """Give every process group of this rank the run's timeout. torch and DeepSpeed make groups with torch's own,
    30 minutes on gloo. Call once all parts are built."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def is_partitioned(param: torch.Tensor) -> bool:
    return hasattr(param, "ds_id")


def full_shape(param: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter, which under ZeRO-3 is not `param.shape`."""
    return param.ds_shape if is_partitioned(param) else param.shape


def local_piece(param: torch.Tensor) -> torch.Tensor:
    """This rank's flat piece of a ZeRO-3 parameter on the accelerator; read-only. The last one ends in padding.

    Raises:
        ValueError: where the piece lies on NVMe.
    """
    piece = param.ds_tensor
    if piece.numel() == 0 or piece.status != PartitionedParamStatus.AVAILABLE:
        raise ValueError(
            "deepspeed `offload_param.device`=nvme: the head's weights must stay in memory; use cpu there. "
            "`offload_optimizer.device` may be nvme"
        )
    return piece.detach().to(get_accelerator().current_device_name())


@contextmanager
def gathered(params: list[torch.Tensor]) -> Iterator[None]:
    """Whole parameters inside the block, to read. All ranks must call."""
    with deepspeed.zero.GatheredParameters(params, enabled=any(map(is_partitioned, params))):
        yield


def full_value(param: torch.Tensor) -> torch.Tensor:
    """A copy of the whole parameter; for small ones. All ranks must call."""
    with gathered([param]):
        return param.detach().clone()


def partitioned_construction(settings: dict[str, Any]) -> deepspeed.zero.Init:
    """Context in which the parameters of a module under construction are partitioned as soon as they exist."""
    return deepspeed.zero.Init(config_dict_or_path=settings)


def can_fill_pieces(settings: dict[str, Any]) -> bool:
    """Whether pieces lie in memory, once each: not on NVMe, and without the second copy of hpZ."""
    zero_settings = settings["zero_optimization"]
    on_nvme = zero_settings.get("offload_param", {}).get("device") == "nvme"
    return not on_nvme and zero_settings.get("zero_hpz_partition_size", 1) <= 1


def piece_span(param: torch.Tensor) -> tuple[int, int]:
    """First and last + 1 element of the flattened parameter in this rank's piece; equal where it is all padding."""
    start = min(dist.get_rank() * param.ds_tensor.ds_numel, param.ds_numel)
    return start, min(start + param.ds_tensor.ds_numel, param.ds_numel)


def fill_piece(param: torch.Tensor, values: torch.Tensor) -> None:
    """Set this rank's piece, before DeepSpeed's engine takes the parameters over (0.19.8: `ds_tensor`)."""
    with torch.no_grad():
        param.ds_tensor[: values.numel()].copy_(values)
        param.ds_tensor[values.numel() :].zero_()


def piece_of(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The part of a whole flat tensor that falls to this rank's piece of `param`, zero-padded."""
    size = param.ds_tensor.ds_numel
    start = dist.get_rank() * size
    piece = full.new_zeros(size)
    own = full.flatten()[start : start + size]
    piece[: own.numel()] = own
    return piece


def put_local_grad(param: torch.Tensor, piece: torch.Tensor, accumulate: bool) -> None:
    """Set this rank's gradient partition, or add to what autograd left there. `piece` is the gradient itself: ZeRO
    has no part in it and does not average it. Call after the last backward of a step, before `engine.step`."""
    if accumulate:
        piece = piece + safe_get_local_grad(param)
    safe_set_local_grad(param, piece)


def void_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make `engine.step` drop this step: deepspeed 0.19.8's ZeRO-3 checks the global gradient norm in any precision
    (`DeepSpeedZeroOptimizer_Stage3.step`), and one infinite partition makes it infinite on every rank."""
    param = next(p for p in engine.module.parameters() if p.requires_grad)
    safe_set_local_grad(param, torch.full_like(safe_get_local_grad(param), torch.inf))


def fetch_rows(param: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64 [S] on CPU, -1 for none) of a matrix, zeros for ids it does not have. All ranks must call.

    A partitioned matrix passes by piece by piece, so that no rank ever holds it whole.
    """
    if not is_partitioned(param):
        device_ids = ids.to(param.device)
        known = (device_ids >= 0) & (device_ids < param.shape[0])
        return torch.where(known[:, None], param.detach()[device_ids.clamp(0, param.shape[0] - 1)], 0)
    num_rows, width = param.ds_shape
    if param.ds_tensor.numel() == 0 or param.ds_tensor.status != PartitionedParamStatus.AVAILABLE:
        with gathered([param]):  # on NVMe: DeepSpeed reads it back, whole, this once
            known = (ids >= 0) & (ids < num_rows)
            return torch.where(known.to(param.device)[:, None], param.detach()[ids.clamp(0, num_rows - 1)], 0)
    rows = torch.zeros(ids.numel(), width, dtype=param.ds_tensor.dtype, device=get_accelerator().current_device_name())
    runs = consecutive_runs(ids, num_rows)
    size = param.ds_tensor.ds_numel
    for owner in range(dist.get_world_size()):
        piece = local_piece(param).clone() if owner == dist.get_rank() else rows.new_empty(size)
        dist.broadcast(piece, owner)
        for place, first, count in runs:
            start = max(first * width, owner * size)
            stop = min((first + count) * width, (owner + 1) * size)
            if start < stop:
                shift = (place - first) * width
                rows.view(-1)[start + shift : stop + shift] = piece[start - owner * size : stop - owner * size]
    return rows


def consecutive_runs(ids: torch.Tensor, num_rows: int) -> list[tuple[int, int, int]]:
    """Stretches of consecutive known ids, as (place in ids, first id, length)."""
    runs: list[list[int]] = []
    for place, row in enumerate(ids.tolist()):
        if not 0 <= row < num_rows:
            continue
        if runs and runs[-1][0] + runs[-1][2] == place and runs[-1][1] + runs[-1][2] == row:
            runs[-1][2] += 1
        else:
            runs.append([place, row, 1])
    return [(place, first, count) for place, first, count in runs]


@contextmanager
def gathered_for_generation(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Every parameter whole and ZeRO's hooks off inside the block, so that ranks may decode at their own pace.

    DeepSpeed's own context leaves the hooks off when its block raises, after which training gathers nothing: the
    error is held back until they are on again. All ranks must call.
    """
    failure: BaseException | None = None
    with unwrap_model_for_generation(engine):
        try:
            yield
        except BaseException as error:  # re-raised below
            failure = error
    if failure is not None:
        raise failure


def offload_optimizer(engine: deepspeed.DeepSpeedEngine) -> None:
    """Move optimizer state and master weights to host memory until `reload_optimizer`.

    Raises:
        ValueError: where the optimizer is not DeepSpeed's FusedAdam, the only one that 0.19.8 can move.
    """
    if type(engine.optimizer.optimizer) is not FusedAdam:
        raise ValueError(
            "teacher_offload=between_steps moves the student's optimizer state, which DeepSpeed does for its own Adam "
            'only: put `"optimizer": {"type": "AdamW", "params": {"lr": "auto", ...}}` into the `deepspeed` JSON'
        )
    states = [OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params]
    engine.offload_states(include=states, pin_memory=get_accelerator().device_name() != "cpu")


def reload_optimizer(engine: deepspeed.DeepSpeedEngine) -> None:
    """Bring back what `offload_optimizer` moved."""
    engine.reload_states()


def moe_leaf_modules(model: nn.Module) -> list[type]:
    """Mark sparse MoE blocks as leaves: ZeRO-3 then fetches a block whole, as ranks route to different experts.

    Returns the classes marked; a dense model has none.
    """
    classes = sorted(
        {type(m) for m in model.modules() if hasattr(m, "experts") and m is not model}, key=lambda c: c.__name__
    )
    if classes:
        deepspeed.utils.set_z3_leaf_modules(model, classes)
    return classes


def count_gathered(model: nn.Module) -> int:
    """Parameters that are whole on this rank although ZeRO-3 does not keep them so."""
    available = ZeroParamStatus.AVAILABLE
    return sum(p.ds_status == available and not p.ds_persist for p in model.parameters() if is_partitioned(p))


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """DeepSpeed's checkpoint in `folder`, without moving its `latest`. All ranks must call.

    `engine.save_checkpoint` has barriers, at which the other ranks would wait for one whose disk is full: its writes'
    errors are held back until all ranks are through.

    Raises:
        CheckpointError: where this rank could not write.
    """
    errors: list[Exception] = []

    def held_back(write: Callable) -> Callable:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch's file writer raises RuntimeError on a full disk
                errors.append(error)

        return attempt

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = held_back(writer.save), held_back(engine._copy_recovery_script)
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        del writer.save, engine._copy_recovery_script
    if errors:
        raise CheckpointError(f"{type(errors[0]).__name__}: {errors[0]}")


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load DeepSpeed's own format, written at this world size. All ranks must call.

    Weights, moments and the place in the schedule are the checkpoint's; rates, decays and the like stay this run's.
    """
    with own_settings(engine):
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed could not load it")


@contextmanager
def own_settings(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Undo what a load inside the block does to the settings of optimizer and schedule.

    deepspeed 0.19.8 puts the checkpoint's groups and base rates over those that the run was configured with, so that a
    new learning rate would be ignored. The schedule is then evaluated where it stands, as if it had always been this
    one. In the universal format, every group even gets the settings of the first, so that norms and biases would decay.
    """
    optimizer, schedule = engine.optimizer.optimizer, engine.lr_scheduler
    # FusedAdam counts steps in its groups as well; where torch's kernels expect their step counts follows from the rest
    kept = ("params", "step", "fused", "foreach", "capturable")
    own = [{key: value for key, value in group.items() if key not in kept} for group in optimizer.param_groups]
    base_lrs = list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else []
    yield
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = base_lrs
        schedule._last_lr = [r * at(schedule.last_epoch) for r, at in zip(base_lrs, schedule.lr_lambdas, strict=True)]
    for group, values, rate in zip(optimizer.param_groups, own, schedule.get_last_lr(), strict=True):
        group.update(values | {"lr": rate})


def load_universal_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load DeepSpeed's universal format. All ranks must call.

    deepspeed 0.19.8 (`load_hp_checkpoint_state_from_checkpoint_dir_stage3`) gives every sub-group the same step tensor,
    which torch's AdamW then advances once per sub-group: that is put right here. The switch is the JSON's
    `checkpoint.load_universal`, set for this one load, as the engine's later checkpoints are of its own format.
    """
    engine._config.load_universal_checkpoint = True
    try:
        load_checkpoint(engine, folder)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()

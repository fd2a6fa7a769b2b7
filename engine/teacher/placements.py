"""From the configuration to a teacher: it is loaded, put where `teacher_placement` says, and tried on packed rows."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from engine.config import GKDConfig
from engine.config.source import teacher_source
from engine.models.backbone import HiddenStates, check_packing, compute_dtype, detach_device_map, load_causal_lm
from engine.teacher.interface import LocalTeacher
from engine.teacher.offload import AlternatingTeacher
from engine.teacher.tensor_parallel import TensorParallelTeacher, build_group
from engine.zero import partitions
from engine.zero.settings import fill_bucket_sizes, teacher_settings


def build_teacher(config: GKDConfig, model: nn.Module | None, device: torch.device) -> LocalTeacher:
    """The teacher in its configured placement, from a model object or `teacher_model_name_or_path`.

    All ranks must call.

    Raises:
        ValueError: for weights that are incomplete, and a class that cannot be used.
    """
    settings = teacher_settings(config) if config.teacher_placement == "zero3" else None
    if model is None:
        model = load_causal_lm(teacher_source(config), compute_dtype(config), settings)
    detach_device_map(model)
    model.eval().requires_grad_(False)
    model.to(compute_dtype(config))
    teacher = _place(config, model, device, settings)
    check_packing(model, lambda batch: next(teacher.hidden_in_turn([batch])), device)
    return teacher


def _place(config: GKDConfig, model: nn.Module, device: torch.device, settings: dict[str, Any] | None) -> LocalTeacher:
    if config.teacher_placement == "tensor_parallel":
        return TensorParallelTeacher(model, build_group(config.teacher_tp_size))
    if config.teacher_offload == "between_steps":
        return AlternatingTeacher(model, device)
    if config.teacher_placement == "replicated":
        return LocalTeacher(model.to(device), HiddenStates(model))
    assert settings is not None  # `zero3`
    partitions.moe_leaf_modules(model)
    fill_bucket_sizes(settings, model.config.get_text_config().hidden_size)
    runner, *_ = deepspeed.initialize(model=HiddenStates(model), config=settings)
    runner.eval()
    return LocalTeacher(model, runner)

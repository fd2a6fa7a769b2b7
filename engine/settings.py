"""DeepSpeed's JSON: the defaults, and how it meets the configuration.

The JSON owns ZeRO and offload, `GKDConfig` owns batch, optimizer and lengths. Where both speak, the JSON's value must
be `"auto"` or equal; else an error names both keys. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from engine.config import GKDConfig

# What a run uses when no DeepSpeed JSON is given; `ds_configs/zero3.json` and `teacher_zero3.json` say the same.
DEFAULT_DEEPSPEED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
}

DEFAULT_TEACHER: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def read_deepspeed(value: Any, field_name: str = "deepspeed") -> dict[str, Any]:
    """The DeepSpeed settings of a config field: a path to a JSON file, a dict, or None for the default."""
    if value is None:
        return copy.deepcopy(DEFAULT_DEEPSPEED)
    if isinstance(value, dict):
        return copy.deepcopy(value)
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"{field_name}={value!r}: no such file")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{field_name}={value!r}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{field_name}={value!r}: must hold a JSON object, holds a {type(settings).__name__}")
    return settings


def resolve_deepspeed(config: GKDConfig, world_size: int, hidden_size: int | None = None) -> dict[str, Any]:
    """The student's DeepSpeed settings with every `"auto"` filled from `config`.

    `hidden_size` fills the bucket sizes as Hugging Face does; without it they keep DeepSpeed's defaults.

    Raises:
        ValueError: where the JSON is not ZeRO stage 3, or sets a value that differs from the config's.
    """
    settings = read_deepspeed(config.deepspeed)
    if settings.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError("deepspeed: `zero_optimization.stage` must be 3; the student is partitioned by ZeRO-3")
    if settings.get("fp16", {}).get("enabled"):
        raise ValueError("deepspeed: `fp16.enabled` is not supported; use the field `bf16`, or fp32 with --bf16 false")
    accumulation = config.accumulation_steps(world_size)
    batch = config.per_device_train_batch_size * accumulation * world_size
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch, "per_device_train_batch_size x gradient_accumulation_steps x ranks"),
        "train_micro_batch_size_per_gpu": (config.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (config.bf16, "bf16"),
    }
    if "optimizer" in settings:
        ours |= {
            "optimizer.params.lr": (config.learning_rate, "learning_rate"),
            "optimizer.params.betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1, adam_beta2"),
            "optimizer.params.eps": (config.adam_epsilon, "adam_epsilon"),
            "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
        }
    if "scheduler" in settings:
        raise ValueError("deepspeed: remove `scheduler`; the field `lr_scheduler_type` sets the schedule")
    for path, (value, field_name) in ours.items():
        *parents, leaf = path.split(".")
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        given = node.get(leaf, "auto")
        if given != "auto" and given != value:
            raise ValueError(
                f"deepspeed `{path}`={given!r} contradicts the config: `{field_name}` gives {value!r}. "
                f'Set `{path}` to "auto", or make the two equal'
            )
        node[leaf] = value
    fill_bucket_sizes(settings, hidden_size)
    return settings


def fill_bucket_sizes(settings: dict[str, Any], hidden_size: int | None) -> None:
    """Replace `"auto"` bucket sizes in place, by Hugging Face's rule (multiples of the hidden size)."""
    zero = settings["zero_optimization"]
    rules = {
        "reduce_bucket_size": lambda h: h * h,
        "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
        "stage3_param_persistence_threshold": lambda h: 10 * h,
    }
    for key, rule in rules.items():
        if zero.get(key) == "auto":
            if hidden_size is None:
                del zero[key]
            else:
                zero[key] = rule(hidden_size)


def teacher_settings(config: GKDConfig) -> dict:
    """DeepSpeed settings of a `zero3` teacher.

    Raises:
        ValueError: where they are not ZeRO stage 3, or bring an optimizer.
    """
    settings = read_deepspeed(config.teacher_deepspeed or DEFAULT_TEACHER, "teacher_deepspeed")
    if settings.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError("teacher_deepspeed: `zero_optimization.stage` must be 3, or set teacher_placement=replicated")
    if "optimizer" in settings:
        raise ValueError("teacher_deepspeed: remove `optimizer`; the teacher is frozen")
    bf16 = settings.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", config.bf16):
        raise ValueError(
            f"teacher_deepspeed `bf16.enabled`={bf16['enabled']} contradicts the field `bf16`={config.bf16}"
        )
    bf16["enabled"] = config.bf16
    return settings

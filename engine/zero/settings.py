"""DeepSpeed's JSON: the defaults, and how it meets the configuration.

The JSON owns ZeRO and offload, `GKDConfig` owns batch, optimizer and lengths. Where both speak, the JSON's value must
be `"auto"` or equal; else an error names both keys. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
from typing import Any

from engine.config import GKDConfig
from engine.config.optimizers import optimizer_arguments, optimizer_kind
from engine.zero.deepspeed_json import expand_nvme_paths, read_json

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


# What DeepSpeed builds from an `optimizer` block: the parameters that the configuration fills in, and those that are
# the JSON's own. Of the others, Lamb looks at whole matrices, which ZeRO-3 has cut; deepspeed 0.19.8's ZeRO-3 takes
# Adagrad's parameter groups away and fails at the first step; MuAdam needs a package of its own.
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "AdamW": (
        "lr betas eps weight_decay",
        "adam_w_mode bias_correction fp32_optimizer_states torch_adam",
    ),
    "Adam": ("lr betas eps weight_decay", "adam_w_mode bias_correction fp32_optimizer_states torch_adam"),
    "Lion": ("lr betas weight_decay", ""),
    "Muon": ("lr betas eps weight_decay", "adam_lr adam_w_mode momentum muon_lr ns_method per_head_muon torch_adam"),
    "SGD": ("lr weight_decay", "dampening momentum nesterov"),
}
# What an `optim` is as a block, by kind.
BLOCK_OF = {"adamw": "AdamW", "fused_adam": "AdamW", "lion": "Lion", "muon": "Muon", "sgd": "SGD"}
BUILT_BY_DEEPSPEED = ("fused_adam", "muon")  # whatever the JSON says
ON_CPU = ("adamw", "fused_adam", "lion")  # kinds that DeepSpeed has a CPU optimizer of
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def read_deepspeed(value: Any, field_name: str = "deepspeed") -> dict[str, Any]:
    """The DeepSpeed settings of a config field: a path to a JSON file, a dict, or None for the default.

    Raises:
        ValueError: for a file that is not there, is no JSON object, or has an unknown key.
    """
    return copy.deepcopy(DEFAULT_DEEPSPEED) if value is None else read_json(value, field_name)


def resolve_deepspeed(
    config: GKDConfig, world_size: int, hidden_size: int | None = None, is_given: bool = False
) -> dict[str, Any]:
    """The student's DeepSpeed settings with every `"auto"` filled from `config`.

    `hidden_size` fills the bucket sizes as Hugging Face does; without it they keep DeepSpeed's defaults. `is_given`:
    the caller has an optimizer of their own. There is an `optimizer` block where DeepSpeed is to build it.

    Raises:
        ValueError: where the JSON is not ZeRO stage 3, or sets a value that differs from the config's.
    """
    settings = read_deepspeed(config.deepspeed)
    if settings.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError("deepspeed: `zero_optimization.stage` must be 3; the student is partitioned by ZeRO-3")
    drop_fp16(settings, "deepspeed")
    accumulation = config.accumulation_steps(world_size)
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (
            config.global_batch(world_size),
            "per_device_train_batch_size x gradient_accumulation_steps x ranks",
        ),
        "train_micro_batch_size_per_gpu": (config.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (config.bf16, "bf16"),
    }
    fill(settings, ours)
    _resolve_optimizer(settings, config, is_given)
    _drop_scheduler(settings, config)
    fill_bucket_sizes(settings, hidden_size)
    _leave_to_deepspeed(settings, "deepspeed")
    expand_nvme_paths(settings, "deepspeed")
    return settings


def fill(settings: dict[str, Any], ours: dict[str, tuple[Any, str]]) -> None:
    """Set each dotted path of `ours` to its (value, field that gives it); ValueError where the JSON has another."""
    for path, (value, field_name) in ours.items():
        *parents, leaf = path.split(".")
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        given = node.get(leaf, "auto")
        given = list(given) if isinstance(given, tuple) else given  # JSON has lists, Python often tuples
        if given != "auto" and given != value:
            raise ValueError(
                f"deepspeed `{path}`={given!r} contradicts the config: `{field_name}` gives {value!r}. "
                f'Set `{path}` to "auto", or make the two equal'
            )
        node[leaf] = value


def drop_fp16(settings: dict[str, Any], name: str) -> None:
    """Take an `fp16` block out: "auto" is off, as nothing here asks for it."""
    if settings.pop("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise ValueError(f"{name}: `fp16.enabled` is not supported; use the field `bf16`, or fp32 with --bf16 false")


def _resolve_optimizer(settings: dict[str, Any], config: GKDConfig, is_given: bool) -> None:
    """Fill the parameters of an `optimizer` block that its optimizer takes; make or leave out a block by `optim`."""
    if settings.get("optimizer"):
        _check_block(settings["optimizer"], config, is_given)
    else:
        settings.pop("optimizer", None)
        if not _needs_block(settings, config, is_given):
            settings["zero_allow_untested_optimizer"] = True  # the engine's own tests have it
            return
        params = optimizer_arguments(config.optim, config.optim_args)
        kind = optimizer_kind(config.optim)
        if kind == "muon":  # the rest of the weights by torch's AdamW, which is not compiled first
            params |= {"torch_adam": True}
        settings["optimizer"] = {"type": BLOCK_OF[kind], "params": params}
    block = settings["optimizer"]
    names = {name.lower(): name for name in OPTIMIZERS}
    given = str(block.get("type", ""))
    if given.lower() not in names:
        raise ValueError(f"deepspeed `optimizer.type`={given!r}: must be one of {', '.join(OPTIMIZERS)}")
    block["type"] = name = names[given.lower()]
    filled, own = (words.split() for words in OPTIMIZERS[name])
    values = {
        "lr": (config.learning_rate, "learning_rate"),
        "betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1, adam_beta2"),
        "eps": (config.adam_epsilon, "adam_epsilon"),
        "weight_decay": (config.weight_decay, "weight_decay"),
    }
    params = block.setdefault("params", {})
    for key in [key for key, value in params.items() if value == "auto" and key not in filled]:
        del params[key]  # not one of its parameters, or left to DeepSpeed
    unknown = sorted(set(params) - {*filled, *own})
    if unknown:
        known = ", ".join((*filled, *own))
        raise ValueError(f"deepspeed `optimizer.params.{unknown[0]}`: {name} takes {known}")
    fill(settings, {f"optimizer.params.{key}": values[key] for key in filled})
    if name == "Muon":
        fill(settings, {"zero_optimization.reduce_scatter": (False, "optimizer.type=Muon")})


def _needs_block(settings: dict[str, Any], config: GKDConfig, is_given: bool) -> bool:
    """Whether DeepSpeed builds the optimizer, where the JSON has no block: its own kinds, and CPU Adam beside offload,
    which it demands unless told otherwise, as Hugging Face's integration does."""
    kind, force = optimizer_kind(config.optim), settings.get("zero_force_ds_cpu_optimizer")
    if kind in BUILT_BY_DEEPSPEED and not is_given:
        return True
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "none" or force is False:
        return False
    if kind in ON_CPU and not is_given:
        return True
    if force is True:
        what = "the optimizer that was handed over" if is_given else f"optim={config.optim}"
        raise ValueError(
            f"deepspeed `zero_force_ds_cpu_optimizer`=true: {what} is none of DeepSpeed's CPU optimizers; set it to "
            "false, or use adamw_torch"
        )
    settings["zero_force_ds_cpu_optimizer"] = False
    return False


def _check_block(block: dict[str, Any], config: GKDConfig, is_given: bool) -> None:
    """ValueError where the JSON's `optimizer` block, and another choice of optimizer, are both there."""
    kind = str(block.get("type", ""))
    if is_given:
        raise ValueError(f"deepspeed `optimizer.type`={kind!r}, and an optimizer was handed over: take one of them out")
    is_default = config.optim == GKDConfig.options()["optim"].default
    if not is_default and BLOCK_OF.get(optimizer_kind(config.optim), "").lower() not in (
        kind.lower(),
        f"{kind}w".lower(),
    ):
        raise ValueError(
            f"deepspeed `optimizer.type`={kind!r} contradicts the config: `optim` is {config.optim}. Remove the block, "
            "or make the two equal"
        )
    if config.optim_args:
        raise ValueError(
            f"optim_args={config.optim_args!r}: the `deepspeed` JSON has an `optimizer` block; put it into its `params`"
        )


def _drop_scheduler(settings: dict[str, Any], config: GKDConfig) -> None:
    """Take a `scheduler` block out that has no values of its own: the schedule is `lr_scheduler_type`'s."""
    block = settings.get("scheduler", {})
    advice = "remove `scheduler`; the field `lr_scheduler_type` sets the schedule"
    if block and block.get("type") not in SCHEDULERS:
        raise ValueError(f"deepspeed `scheduler.type`={block.get('type')!r}: {advice}")
    equal = {"warmup_min_lr": 0, "warmup_max_lr": config.learning_rate, "warmup_num_steps": config.warmup_steps,
             "total_num_steps": config.max_steps, "warmup_type": "linear"}  # fmt: skip
    for key, value in block.get("params", {}).items():
        if value != "auto" and (key not in equal or value != equal[key]):
            raise ValueError(f"deepspeed `scheduler.params.{key}`={value!r}: {advice}, `warmup_steps` its warm-up")
    settings.pop("scheduler", None)


def replaced_scheduler(config: GKDConfig) -> str | None:
    """A sentence about the JSON's `scheduler` block, which gives way to the field; None where there is none."""
    kind = read_deepspeed(config.deepspeed).get("scheduler", {}).get("type")
    return kind and f"deepspeed `scheduler` {kind} gives way to lr_scheduler_type={config.lr_scheduler_type}"


def _leave_to_deepspeed(settings: dict[str, Any], name: str) -> None:
    """Take out each "auto" left in the ZeRO block, as DeepSpeed does; elsewhere it would take the word itself."""
    zero = settings["zero_optimization"]
    for block in (zero, *(value for value in zero.values() if isinstance(value, dict)), settings.get("bf16", {})):
        for key in [key for key, value in block.items() if value == "auto"]:
            del block[key]
    for key in [key for key, value in settings.items() if value == "auto"]:
        raise ValueError(f'{name} `{key}`="auto": no field of the configuration gives it; set a value, or remove it')


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
    """DeepSpeed settings of a `zero3` teacher. A student's JSON serves, too: what concerns training alone is left out.

    Raises:
        ValueError: where they are not ZeRO stage 3, or bring an optimizer.
    """
    name = "teacher_deepspeed"
    settings = read_json(config.teacher_deepspeed or DEFAULT_TEACHER, name)
    if settings.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError(f"{name}: `zero_optimization.stage` must be 3, or set teacher_placement=replicated")
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ValueError(f"{name}: remove `{key}`; the teacher is frozen")
    drop_fp16(settings, name)
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        settings.pop(key, None)
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed wants a number, and nothing asks for it
    settings["zero_optimization"].pop("offload_optimizer", None)
    expand_nvme_paths(settings, name)
    bf16 = settings.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", config.bf16):
        raise ValueError(f"{name} `bf16.enabled`={bf16['enabled']} contradicts the field `bf16`={config.bf16}")
    bf16["enabled"] = config.bf16
    return settings

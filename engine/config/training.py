"""The section on optimization: batch, optimizer, schedule, precision, device."""

from dataclasses import dataclass
from typing import Any

from engine.config.options import OrDefault, PathText, option

# transformers' names
LR_SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip


@dataclass(kw_only=True)
class TrainingFields:
    """Optimization."""

    per_device_train_batch_size: int = option(8, "Sequences of one micro-batch on one rank.")
    per_device_eval_batch_size: int = option(8, "Sequences of one evaluation batch on one rank.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of one optimizer step.")
    global_batch_size: int | None = option(
        None, "Sequences of one optimizer step over all ranks; sets the accumulation steps."
    )
    num_train_epochs: float = option(3.0, "Passes over the training rows, where `max_steps` is not set.")
    max_steps: int = option(-1, "Optimizer steps to take; positive overrides `num_train_epochs`.")
    optim: str = option("adamw_torch_fused", "Optimizer, by transformers' name.")
    optim_args: str | None = option(None, "More arguments of the optimizer, as `name=value,name=value`.")
    learning_rate: float = option(2e-5, "Peak learning rate.")
    weight_decay: float = option(0.0, "AdamW weight decay; biases and norms are exempt.")
    adam_beta1: float = option(0.9, "AdamW first-moment decay.")
    adam_beta2: float = option(0.999, "AdamW second-moment decay.")
    adam_epsilon: float = option(1e-8, "AdamW denominator term.")
    max_grad_norm: float = option(1.0, "Clip the global gradient norm to this; 0 switches clipping off.")
    lr_scheduler_type: str = option(
        "linear", "Learning-rate schedule after warm-up (transformers' names).", choices=LR_SCHEDULERS
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = option(
        None, "More arguments of the schedule, such as num_cycles; JSON or a dict."
    )
    warmup_ratio: float = option(0.0, "Share of the steps over which the learning rate rises.")
    warmup_steps: float = option(
        0, "Steps over which the learning rate rises, below 1 a share of all; positive overrides `warmup_ratio`."
    )
    bf16: OrDefault[bool] = option(True, "Compute in bfloat16 with fp32 master weights; false computes in fp32.")
    tf32: bool | None = option(
        None, "Whether fp32 products may use TF32 on the tensor cores; unset: PyTorch's own way."
    )
    gradient_checkpointing: OrDefault[bool] = option(True, "Recompute activations in the backward pass to save memory.")
    deepspeed: dict[str, Any] | PathText | None = option(
        None, "DeepSpeed JSON (path, dict, text); unset: ZeRO-3 without offload."
    )
    seed: int = option(42, "Seed of data order, on-policy draws and sampling.")
    full_determinism: bool = option(False, "Take PyTorch's deterministic kernels, which are slower.")
    use_cpu: bool = option(False, "Train on CPU also where there is an accelerator.")

"""The student's optimizer, where DeepSpeed does not build it from its JSON: made by `optim`, or handed over.

ZeRO-3 replaces the weights in an optimizer's groups by flat pieces of them, in fp32. What works element by element
gives the same weights at any number of ranks. Knows nothing of losses or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from engine.config import GKDConfig
from engine.config.optimizers import optimizer_arguments, optimizer_kind
from engine.zero import partitions

WITH_FUSED_ADAMW = ("cpu", "cuda", "xpu")  # devices that torch has the kernel for


class Lion(Optimizer):
    """Lion (arXiv 2302.06675, Algorithm 2), with decoupled weight decay.

    DeepSpeed's own compiles its kernels first, and has none for weights that a CPU trains.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                param.mul_(1 - rate * group["weight_decay"])
                param.add_(state["exp_avg"].lerp(param.grad, 1 - beta1).sign_(), alpha=-rate)
                state["exp_avg"].lerp_(param.grad, 1 - beta2)
        return loss


# What works element by element, of torch and of DeepSpeed, and makes its state at the first step.
ELEMENTWISE = (
    Adam, AdamW, Adamax, Adadelta, NAdam, RAdam, RMSprop, Rprop, SGD, Lion,
    FusedAdam, DeepSpeedCPUAdam, FusedLion, DeepSpeedCPULion,
)  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm weights do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(partitions.full_shape(p)) >= 2]
    vectors = [p for p in trainable if len(partitions.full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: GKDConfig) -> Optimizer:
    """The optimizer that `optim` names, over fp32 master weights; none of those that DeepSpeed builds."""
    groups, rate = parameter_groups(model, config.weight_decay), config.learning_rate
    betas, kind = (config.adam_beta1, config.adam_beta2), optimizer_kind(config.optim)
    arguments = optimizer_arguments(config.optim, config.optim_args)
    if kind == "sgd":
        return SGD(groups, lr=rate, **arguments)
    if kind == "rmsprop":
        return RMSprop(groups, lr=rate, **arguments)
    if kind == "lion":
        return Lion(groups, rate, betas)
    assert kind == "adamw"
    is_fused = "fused" in config.optim and get_accelerator().device_name() in WITH_FUSED_ADAMW
    return AdamW(groups, lr=rate, betas=betas, eps=config.adam_epsilon, fused=is_fused or None)


def check_given(optimizer: Any, model: nn.Module) -> None:
    """Whether ZeRO-3 can take an optimizer that was handed over.

    Raises:
        ValueError: where it does not work element by element, has made its state already, or does not have just those
            weights of the model that are to be trained.
    """
    kind = type(optimizer)
    advice = "set `optim` in its place"
    if not isinstance(optimizer, ELEMENTWISE):
        allowed = ", ".join(known.__name__ for known in ELEMENTWISE)
        raise ValueError(
            f"optimizers=: {kind.__module__}.{kind.__qualname__} is not known to work element by element, and under "
            f"ZeRO-3 an optimizer sees flat pieces of the weights: use one of {allowed}, or {advice}"
        )
    if optimizer.state:
        raise ValueError(
            f"optimizers=: this {kind.__name__} has taken steps, and its state is of whole weights, which ZeRO-3 cuts: "
            f"make a new one, or {advice}"
        )
    names = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    own = [id(param) for group in optimizer.param_groups for param in group["params"]]
    foreign = len(set(own) - {id(param) for param in model.parameters()})
    if foreign:
        raise ValueError(
            f"optimizers=: {foreign} of its {len(own)} weights are not the student's: make it of the "
            "parameters() of the model object that the trainer gets"
        )
    missing = [name for param, name in names.items() if param not in set(own)]
    if missing:
        raise ValueError(
            f"optimizers=: it lacks {len(missing)} of the student's weights, {missing[0]} the first: give it all of "
            "them, or set requires_grad=False on those that are not trained"
        )

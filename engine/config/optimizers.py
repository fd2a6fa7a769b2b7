"""The optimizers that `optim` may name, what `optim_args` may say to each, and why others cannot be.

Under ZeRO-3 an optimizer gets flat pieces of the weights, another cut at each number of ranks: one that works element
by element gives the same weights at all of them, one that looks at matrices or at blocks does not. Muon, which looks at
matrices, is DeepSpeed's own. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.values import coerce

# transformers' names, older ones among them, and what stands for each. `fused_adam` is DeepSpeed's kernel.
KIND_OF: Mapping[str, str] = MappingProxyType(
    {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_torch_xla": "adamw",
        "adamw_torch_npu_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_apex_fused": "fused_adam",
        "lion": "lion",
        "lion_32bit": "lion",
        "muon": "muon",
        "rmsprop": "rmsprop",
        "sgd": "sgd",
    }
)
ARGUMENTS: Mapping[str, Mapping[str, type]] = MappingProxyType(
    {
        "adamw": {},
        "fused_adam": {},
        "lion": {},
        "muon": {"momentum": float, "muon_lr": float, "adam_lr": float, "ns_method": str, "per_head_muon": bool},
        "rmsprop": {"momentum": float, "alpha": float, "eps": float, "centered": bool},
        "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    }
)

_BLOCKS = (
    "its blocks of 8 or 4 bits would lie otherwise at each number of ranks: use adamw_torch, and for memory "
    "`offload_optimizer` of the DeepSpeed JSON"
)
_MATRICES = "it looks at whole matrices, which ZeRO-3 has cut into flat pieces: use adamw_torch, or muon"
_PAGED = "use adamw_torch or lion, and `offload_optimizer` of the DeepSpeed JSON to keep its state in host memory"
_SCHEDULE_FREE = (
    "it trains other weights than it evaluates and exports: use adamw_torch with lr_scheduler_type=constant_with_warmup"
)
_IN_BACKWARD = (
    "it updates weights in the backward pass, where ZeRO-3 has not reduced the gradients yet: use adamw_torch"
)
_NOT_HERE = "it is not built in: use adamw_torch"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "adafactor": _MATRICES,
        "galore_adamw": _MATRICES,
        "galore_adamw_8bit": _MATRICES,
        "galore_adafactor": _MATRICES,
        "galore_adamw_layerwise": _MATRICES,
        "galore_adamw_8bit_layerwise": _MATRICES,
        "galore_adafactor_layerwise": _MATRICES,
        "apollo_adamw": _MATRICES,
        "apollo_adamw_layerwise": _MATRICES,
        "stable_adamw": _MATRICES,
        "adamw_torch_4bit": _BLOCKS,
        "adamw_torch_8bit": _BLOCKS,
        "adamw_bnb_8bit": _BLOCKS,
        "adamw_8bit": _BLOCKS,
        "ademamix_8bit": _BLOCKS,
        "lion_8bit": _BLOCKS,
        "paged_adamw_8bit": _BLOCKS,
        "paged_ademamix_8bit": _BLOCKS,
        "paged_lion_8bit": _BLOCKS,
        "rmsprop_bnb": _BLOCKS,
        "rmsprop_bnb_8bit": _BLOCKS,
        "rmsprop_bnb_32bit": "use rmsprop",
        "paged_adamw": _PAGED,
        "paged_adamw_32bit": _PAGED,
        "paged_ademamix_32bit": _PAGED,
        "paged_lion_32bit": _PAGED,
        "schedule_free_radam": _SCHEDULE_FREE,
        "schedule_free_adamw": _SCHEDULE_FREE,
        "schedule_free_sgd": _SCHEDULE_FREE,
        "lomo": _IN_BACKWARD,
        "adalomo": _IN_BACKWARD,
        "adagrad": "it makes its state before ZeRO-3 cuts the weights: use rmsprop, or adamw_torch",
        "ademamix": _NOT_HERE,
        "grokadamw": _NOT_HERE,
        "adamw_anyprecision": _NOT_HERE,
    }
)


def optimizer_kind(optim: str) -> str:
    """What stands for a name, one of `ARGUMENTS`; ValueError for a name that is unknown or cannot be."""
    if optim in KIND_OF:
        return KIND_OF[optim]
    if optim in REFUSED:
        raise ValueError(f"optim={optim} is not supported: {REFUSED[optim]}")
    near = difflib.get_close_matches(optim, KIND_OF, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"optim={optim!r}{meant}: must be one of {', '.join(KIND_OF)}")


def optimizer_arguments(optim: str, optim_args: str | None) -> dict[str, Any]:
    """`optim_args` as keyword arguments.

    Raises:
        ValueError: as `optimizer_kind`, and for text of another form, or an argument that the optimizer lacks.
    """
    known = ARGUMENTS[optimizer_kind(optim)]
    values: dict[str, Any] = {}
    for part in (optim_args or "").replace(" ", "").split(","):
        if not part:
            continue
        name, equals, text = part.partition("=")
        if not equals or not text:
            raise ValueError(f"optim_args={optim_args!r}: must be written name=value,name=value")
        if name not in known:
            allowed = f"takes {', '.join(known)} there" if known else "takes none there"
            raise ValueError(
                f"optim_args={optim_args!r}: optim={optim} {allowed}, and not {name}; learning_rate, weight_decay, "
                "adam_beta1, adam_beta2 and adam_epsilon are fields"
            )
        values[name] = coerce(f"optim_args {name}", text, known[name])
    return values


def optimizer_problem(optim: str, optim_args: str | None) -> str | None:
    """What is wrong with the two fields, as a sentence; None where nothing is."""
    try:
        optimizer_arguments(optim, optim_args)
    except ValueError as error:
        return str(error)
    return None

"""Other names of fields: those that newer versions of transformers gave them, and those of older scripts.

A value moves to the field of the name on the right, and what it came by is unset again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.config.options import option

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
        "ddp_timeout": "timeout_s",
        "evaluation_strategy": "eval_strategy",
        "max_seq_length": "max_length",
        "no_cuda": "use_cpu",
        "per_gpu_train_batch_size": "per_device_train_batch_size",
        "per_gpu_eval_batch_size": "per_device_eval_batch_size",
        "push_to_hub_model_id": "hub_model_id",
        "push_to_hub_token": "hub_token",
    }
)


@dataclass(kw_only=True)
class RenamedFields:
    """Other names."""

    activation_checkpointing: bool | None = option(None, "Another name of `gradient_checkpointing`.")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Another name of `gradient_checkpointing_kwargs`."
    )
    ddp_timeout: int | None = option(None, "Another name of `timeout_s`, in seconds.")
    evaluation_strategy: str | None = option(None, "The old name of `eval_strategy`.")
    max_seq_length: int | None = option(None, "The old name of `max_length`.")
    no_cuda: bool | None = option(None, "The old name of `use_cpu`.")
    per_gpu_train_batch_size: int | None = option(None, "The old name of `per_device_train_batch_size`.")
    per_gpu_eval_batch_size: int | None = option(None, "The old name of `per_device_eval_batch_size`.")
    push_to_hub_model_id: str | None = option(None, "The old name of `hub_model_id`.")
    push_to_hub_token: str | None = option(None, "The old name of `hub_token`.", is_secret=True)
    push_to_hub_organization: str | None = option(None, "What stands before the `/` in `hub_model_id`.")
    local_rank: int = option(-1, "The launcher's environment says it: `args.local_process_index`.")

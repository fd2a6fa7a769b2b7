"""Fields of TRL's and transformers' scripts that a run must not pass over. Each sentence says what to do instead.

Their default, and what is false where the default is, is taken without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.config.options import option

_COMPILE = "The loss alone is compiled: use `compile_loss`."
_FSDP = "The student is partitioned by ZeRO-3: remove it, and use `deepspeed` for offload."
_TRACKIO = "Trackio is no tracker here: remove it, and use `report_to` with wandb or tensorboard."
_METRICS = "There are no predictions to compute metrics of: remove it, and use an `on_evaluate` callback."
_ACCELERATE = "Accelerate is not used: remove it; batch sizes and `deepspeed` say how rows and weights are spread."


@dataclass(kw_only=True)
class RefusedFields:
    """Refused, with what to do instead."""

    fp16: bool = option(False, "The loss needs the range of bfloat16: use `bf16`, or bf16=false for fp32.")
    fp16_full_eval: bool = option(False, "Evaluation computes as training does: remove it, see `bf16`.")
    fsdp: str | None = option(None, _FSDP)
    fsdp_config: dict[str, Any] | str | None = option(None, _FSDP)
    accelerator_config: dict[str, Any] | str | None = option(None, _ACCELERATE)
    parallelism_config: dict[str, Any] | str | None = option(None, _ACCELERATE)
    auto_find_batch_size: bool = option(
        False, "A batch that does not fit ends the run: set a smaller `per_device_train_batch_size`."
    )
    average_tokens_across_devices: bool = option(
        True, "The loss is the mean over all ranks' tokens: remove it; `loss_normalization` has other means."
    )
    optim_target_modules: list[str] | str | None = option(
        None, "Only GaLore, APOLLO and the like read it, and under ZeRO-3 they see no matrices: remove it."
    )
    torch_compile: bool = option(False, _COMPILE)
    torch_compile_backend: str | None = option(None, _COMPILE)
    torch_compile_mode: str | None = option(None, _COMPILE)
    loss_type: str = option("nll", "The loss is a divergence: use `divergence`, and `sft_weight` for an nll term.")
    truncation_mode: str = option(
        "keep_start", "Completions are cut at their end to fit `max_length`, prompts never: cut rows beforehand."
    )
    train_sampling_strategy: str = option(
        "random", "Each pass over the rows has a random order: remove it; `data_seed` chooses the order."
    )
    ignore_data_skip: bool = option(
        False, "A resumed run goes on in its rows: use `allow_data_change` to begin the data anew."
    )
    label_names: list[str] | None = option(
        None, "What is learnt follows from the columns: rename yours as engine/data/README.md says."
    )
    include_for_metrics: list[str] | None = option(None, _METRICS)
    batch_eval_metrics: bool = option(False, _METRICS)
    trackio_space_id: str | None = option(None, _TRACKIO)
    trackio_bucket_id: str | None = option(None, _TRACKIO)
    trackio_static_space_id: str | None = option(None, _TRACKIO)
    # What older versions had
    include_inputs_for_metrics: bool | None = option(None, _METRICS)
    split_batches: bool | None = option(
        None, "A batch is never split over ranks: use `global_batch_size` for the sequences of one step."
    )
    fsdp_min_num_params: int | None = option(None, _FSDP)
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, _FSDP)
    torchdynamo: str | None = option(None, _COMPILE)
    past_index: int | None = option(None, "Training has no memory across rows: remove it.")
    mp_parameters: str | None = option(None, "SageMaker's model parallelism is not used: remove it, use `deepspeed`.")
    tp_size: int | None = option(
        None, "The student is partitioned by ZeRO-3: remove it; `teacher_tp_size` is for the teacher."
    )
    tpu_num_cores: int | None = option(None, "TPUs are not supported: remove it.")
    tpu_metrics_debug: bool | None = option(None, "TPUs are not supported: remove it.")
    adafactor: bool | None = option(None, "Under ZeRO-3 Adafactor sees no matrices to factor: use `optim`.")


# Values beside the default that ask for nothing else than what is done.
HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "loss_type": ("chunked_nll",),  # its memory, which the loss never needs
        "train_sampling_strategy": ("group_by_length",),  # its padding, which there is not
        "label_names": (["labels"],),  # the column that is read
        "past_index": (-1,),
        "trackio_space_id": ("trackio",),  # the default of transformers 4.57
    }
)

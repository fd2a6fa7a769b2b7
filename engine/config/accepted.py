"""Fields of TRL's and transformers' scripts that change nothing here. Each sentence says why."""

from dataclasses import dataclass
from typing import Any

from engine.config.options import option

_PACKED = "Micro-batches are always packed, whole rows without padding."
_READER = "Rows come from the engine's own reader, see `dataset_num_proc`."
_METRICS = "Evaluation gives metrics, never predictions."
_NO_DDP = "There is no DDP under ZeRO-3."
_FP16 = "It concerns fp16."


@dataclass(kw_only=True)
class AcceptedFields:
    """Accepted, since it changes nothing here."""

    # Rows and batches
    packing: bool = option(False, _PACKED)
    packing_strategy: str = option("bfd", _PACKED)
    padding_free: bool = option(False, "There is no padding.")
    pad_to_multiple_of: int | str | None = option("auto", "There is no padding.")
    eval_packing: bool | None = option(None, "Evaluation packs rows as training does.")
    shuffle_dataset: bool = option(False, "Each pass over the rows has an order of its own.")
    remove_unused_columns: bool = option(True, "Columns that mean nothing here are passed over.")
    dataset_kwargs: dict[str, Any] | str | None = option(
        None, "Rows that are tokenised already are known by their columns."
    )
    assistant_only_loss: bool = option(
        False, "Every assistant turn counts, and nothing else; a message with weight 0 is left out."
    )
    length_column_name: str = option("length", "Without padding there is nothing to group by length.")
    dataloader_drop_last: bool = option(False, "Every step is a whole global batch, across the end of a pass.")
    dataloader_num_workers: int = option(0, _READER)
    dataloader_pin_memory: bool = option(True, _READER)
    dataloader_persistent_workers: bool = option(False, _READER)
    dataloader_prefetch_factor: int | None = option(None, _READER)
    dataloader_multiprocessing_context: str | None = option(None, _READER)
    dataloader_in_order: bool = option(True, "The order of rows is a function of seed and step.")
    # Memory and speed
    use_liger_kernel: bool = option(False, "The loss never holds whole logits; the model keeps its own layers.")
    liger_kernel_config: dict[str, Any] | str | None = option(None, "The model keeps its own layers.")
    use_cache: bool = option(False, "Training has no KV cache, rollouts always have one.")
    activation_offloading: bool = option(False, "It is a matter of memory alone; the DeepSpeed JSON has offload.")
    torch_empty_cache_steps: int | None = option(None, "It is a matter of memory alone, as is `loss_chunk_bytes`.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Activations are always recomputed the non-reentrant way, which gives the same gradients."
    )
    bf16_full_eval: bool = option(False, "Evaluation computes as training does, see `bf16`.")
    ddp_find_unused_parameters: bool | None = option(None, _NO_DDP)
    ddp_bucket_cap_mb: int | None = option(None, "There is no DDP under ZeRO-3; bucket sizes are the DeepSpeed JSON's.")
    ddp_broadcast_buffers: bool | None = option(None, _NO_DDP)
    ddp_static_graph: bool | None = option(None, _NO_DDP)
    ddp_backend: str | None = option(None, "The backend follows from the device.")
    # Evaluation and logs
    prediction_loss_only: bool = option(False, _METRICS)
    eval_do_concat_batches: bool = option(True, _METRICS)
    eval_use_gather_object: bool = option(False, _METRICS)
    eval_accumulation_steps: int | None = option(None, _METRICS)
    log_on_each_node: bool = option(True, "Each rank has a log file; the console shows the first rank's.")
    logging_nan_inf_filter: bool = option(True, "A loss that is not finite is always shown, see `max_bad_steps`.")
    include_num_input_tokens_seen: str | bool = option(False, "`train/tokens_total` is always logged.")
    skip_memory_metrics: bool = option(True, "The peak of memory is always logged.")
    debug: list[str] | str | None = option(None, "A loss that is not finite names its rows, see `max_bad_steps`.")
    # Checkpoints
    save_on_each_node: bool = option(False, "The run folder is one that all hosts share.")
    enable_jit_checkpoint: bool = option(False, "A signal that ends a job always saves first.")
    # What older versions had
    logging_dir: str | None = option(None, "TensorBoard's files lie in the run folder.")
    save_safetensors: bool | None = option(True, "Weights are always written as safetensors.")
    include_tokens_per_second: bool | None = option(None, "`perf/tokens_per_s` is always logged.")
    group_by_length: bool | None = option(None, "Without padding there is nothing to group by length.")
    half_precision_backend: str | None = option("auto", _FP16)
    fp16_backend: str | None = option("auto", _FP16)
    fp16_opt_level: str | None = option("O1", _FP16)
    use_ipex: bool | None = option(None, "PyTorch's own kernels are used.")
    use_mps_device: bool | None = option(None, "The device is found.")
    use_legacy_prediction_loop: bool | None = option(None, _METRICS)
    jit_mode_eval: bool | None = option(None, "Evaluation computes as training does.")
    ray_scope: str | None = option("last", "It concerns a search over hyperparameters.")
    dispatch_batches: bool | None = option(None, "Every rank reads its own rows.")
    dataset_batch_size: int | None = option(1000, _READER)
    num_of_sequences: int | None = option(1024, _PACKED)
    chars_per_token: float | None = option(3.6, _PACKED)
    use_liger: bool | None = option(None, "The loss never holds whole logits; the model keeps its own layers.")

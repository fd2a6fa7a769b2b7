"""DeepSpeed's JSON as people have it: where it is read from, which keys it may have, and what its blanks mean.

The keys are those of deepspeed 0.19.8, and a test compares them (tests/unit/zero/test_deepspeed_json.py): most of its
blocks ignore a key they do not know, so that a typo would go unnoticed. Imports neither torch nor DeepSpeed, and knows
nothing of the configuration's values (settings.py does).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from engine.paths import expand_path
from engine.values import parse_json

_STAGE3 = """allgather_sequential gather_16bit_weights_on_model_save max_live_parameters max_reuse_distance
    model_persistence_threshold module_granularity_threshold param_persistence_threshold prefetch_bucket_size
    use_all_reduce_for_fetch_params""".split()

# The keys of each block, by its path; "" is the top level. A block that is not here is not looked into.
KEYS: dict[str, set[str]] = {
    "": set(
        """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
        compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
        disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
        wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        zero_optimization""".split()
    ),
    "zero_optimization": set(
        """allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload
        cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters
        leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear
        offload_optimizer offload_param overlap_comm override_module_apply parameter_alignment
        pipeline_loading_checkpoint reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage stage3_gather_fp16_weights_on_model_save sub_group_size
        use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""".split()
    )
    | {prefix + name for name in _STAGE3 for prefix in ("", "stage3_")},
    "zero_optimization.offload_param": set("buffer_count buffer_size device max_in_cpu nvme_path pin_memory".split()),
    "zero_optimization.offload_optimizer": set(
        """buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
        super_offload""".split()
    ),
    "zero_optimization.leaf_module": {"classes", "name_suffixes", "names"},
    "bf16": set(
        """bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled
        immediate_grad_update""".split()
    ),
    "fp16": set(
        """auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power
        loss_scale loss_scale_window min_loss_scale""".split()
    ),
    "torch_autocast": {"dtype", "enabled", "lower_precision_safe_modules"},
    "optimizer": {"legacy_fusion", "params", "type"},
    "scheduler": {"params", "type"},
    "data_types": {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"},
    "activation_checkpointing": set(
        """contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary""".split()
    ),
    "aio": set("block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds".split()),
    "checkpoint": set(
        "checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage writer".split()
    ),
}

# What earlier versions had and 0.19.8 refuses even where it is switched off.
REMOVED: dict[str, set[str]] = {
    "": set(
        """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
        progressive_layer_drop quantize_training sparse_attention sparse_gradients""".split()
    ),
    "zero_optimization": {"mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param"},
}
RENAMED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}  # in zero_optimization
BLOCKS = {path for path in KEYS if path} | {"zero_optimization", "optimizer.params", "scheduler.params"}


def read_json(value: Any, name: str) -> dict[str, Any]:
    """The settings of a config field: a JSON file's path, or a dict. Fresh, without nulls, with known keys alone.

    Raises:
        ValueError: where there is no such file, it is no JSON object, or a key is unknown (the nearest is named).
    """
    settings = value if isinstance(value, dict) else _load(Path(value), name)
    settings = _without_nulls(settings)
    if "bfloat16" in settings:  # its name in older files
        settings.setdefault("bf16", settings.pop("bfloat16"))
    _check_keys(settings, name)
    return settings


def expand_nvme_paths(settings: dict[str, Any], name: str) -> None:
    """Fill in `~` and variables, in place; hosts may differ in them, so not while settings are compared."""
    for key in ("offload_param", "offload_optimizer"):
        block = settings["zero_optimization"].get(key, {})
        if "nvme_path" in block:
            block["nvme_path"] = expand_path(block["nvme_path"], f"{name} `zero_optimization.{key}.nvme_path`")


def _load(path: Path, name: str) -> dict[str, Any]:
    label = f"{name}={str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{label}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{label}: cannot be read ({error})") from error
    return parse_json(text, label)


def _without_nulls(node: Any) -> Any:
    """A copy in which a key that is null is not there: null means unset in every block."""
    if isinstance(node, dict):
        return {key: _without_nulls(value) for key, value in node.items() if value is not None}
    return [_without_nulls(value) for value in node] if isinstance(node, list) else node


def _check_keys(settings: dict[str, Any], name: str, path: str = "") -> None:
    for key in list(settings):
        full = f"{path}.{key}" if path else key
        value = settings[key]
        off = is_off(value)
        if key in REMOVED.get(path, ()):
            if not off:
                raise ValueError(f"{name} `{full}`={value!r}: removed from DeepSpeed; take it out")
            del settings[key]
        elif path == "zero_optimization" and key in RENAMED:
            if not off:
                raise ValueError(f'{name} `{full}`={value!r}: write `{RENAMED[key]}`: {{"device": "cpu"}} instead')
            del settings[key]
        elif path in KEYS and key not in KEYS[path]:
            near = difflib.get_close_matches(key, KEYS[path], n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(KEYS[path]))}"
            raise ValueError(f"{name}: unknown key `{full}`; {hint}")
        elif full in BLOCKS:
            if not isinstance(value, dict):
                raise ValueError(f"{name} `{full}`={value!r}: must be an object {{...}}")
            _check_keys(value, name, full)


def is_off(value: Any) -> bool:
    """Whether a key's value says that its feature is not used."""
    if isinstance(value, dict):
        return value.get("enabled", False) in (False, "auto")
    return value in (False, -1, 0, "auto", "none")

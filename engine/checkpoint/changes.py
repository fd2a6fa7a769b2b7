"""What a resumed run does otherwise than the run of its checkpoint: which fields and rows differ, and what counts.

Knows configurations and the records of a manifest; no files, no ranks. A field that no set below names takes its new
value and is named. Fields of another version of the engine, which only one of the two knows, are passed over.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from engine.config import GKDConfig
from engine.config.accepted import AcceptedFields
from engine.config.optimizers import optimizer_kind
from engine.config.options import options_of
from engine.zero.settings import read_deepspeed

# Where a run lies, what it shows, how it is spread over devices: they change no result beyond rounding. The rows
# themselves are compared, not their names; the global batch has its own check (engine/checkpoint/elastic.py).
WITHOUT_A_WORD = frozenset(
    """output_dir overwrite_output_dir run_name report_to project wandb_project wandb_entity wandb_group wandb_tags
    wandb_mode logging_strategy logging_steps logging_first_step log_completions_steps disable_tqdm log_level
    log_level_replica eval_strategy eval_steps eval_delay eval_on_start eval_max_samples save_strategy save_steps
    save_minutes save_total_limit save_only_model save_on_error load_best_model_at_end
    restore_callback_states_from_checkpoint max_minutes resume_from_checkpoint allow_data_change
    timeout_s prepare_timeout_s do_train do_eval do_predict push_to_hub hub_model_id hub_strategy hub_private_repo
    hub_always_push hub_revision dataset_name dataset_config dataset_train_split dataset_test_split dataset_num_proc
    trust_remote_code attn_implementation per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps global_batch_size gradient_checkpointing generation_rows
    generation_placement vocab_parallel_size loss_chunk_bytes compile_loss teacher_placement teacher_tp_size
    teacher_deepspeed teacher_offload deepspeed use_cpu""".split()
) | frozenset(options_of(AcceptedFields))
ORDER_OF_ROWS = frozenset({"seed", "data_seed", "max_samples", "dataset_streaming"})
OF_THE_CHECKPOINT = frozenset({"model_name_or_path"})
REMEDY = "Take back what was, or --allow_data_change begins the data anew"


@dataclasses.dataclass
class Changes:
    """Sentences: what is done otherwise from here on, and what puts the position in the data out of joint."""

    said: list[str]
    order: list[str]


def compare_fields(saved: Mapping[str, Any], config: GKDConfig) -> Changes:
    """`saved` is the configuration in a manifest, which has been through JSON."""
    changes = Changes([], [])
    now = json.loads(json.dumps(config.to_dict(), default=str))
    for name in sorted(now.keys() & saved.keys() - WITHOUT_A_WORD):
        if saved[name] == now[name]:
            continue
        text = f"{name}={saved[name]!r} in the checkpoint, {now[name]!r} now"
        if name in ORDER_OF_ROWS:
            changes.order.append(f"{text}: the order of rows follows from it. {REMEDY}")
        elif name in OF_THE_CHECKPOINT:
            changes.said.append(f"{text}: the weights are the checkpoint's")
        else:
            changes.said.append(f"{text}: the new value counts")
    return changes


def compare_rows(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Both have, under `train`, `eval` and `eval <set>`, split, digest and number of usable rows (None for a stream, of
    which the digest may cover the first rows alone)."""
    changes = Changes([], [])
    for use in sorted(saved.keys() | now.keys(), reverse=True):
        before, after = saved.get(use), now.get(use)
        if before is None or after is None or (before["digest"], before["rows"]) == (after["digest"], after["rows"]):
            continue
        then, here = (f"{part['rows']} usable rows" if part["rows"] else "a stream" for part in (before, after))
        text = f"the rows of split {after['split']!r} are not those of the checkpoint ({then} then, {here} now)"
        if use == "train":
            changes.order.append(f"{text}: its position means nothing in them. {REMEDY}")
        else:
            changes.said.append(f"{text}: its evaluations do not compare with earlier ones")
    return changes


def optimizer_name(config: GKDConfig, given: object = None) -> str:
    """The optimizer whose moments a checkpoint holds; `given` is the caller's own."""
    if given is not None:
        return f"{type(given).__module__}.{type(given).__qualname__}"
    block = read_deepspeed(config.deepspeed).get("optimizer") or {}
    kind = optimizer_kind(config.optim)
    return block.get("type") or {"adamw": "torch.optim.AdamW", "fused_adam": "AdamW"}.get(kind, kind)

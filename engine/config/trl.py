"""The table of TRL's fields: what each of them, and of transformers' `TrainingArguments`, does in a run of this engine.

Code and page at once: the sections say what is accepted, refused and renamed, this file what is the same and what is
mapped onto another thing, and `trl_table` is the end of engine/TRL.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.config.accepted import AcceptedFields
from engine.config.gkd import GKDConfig
from engine.config.options import options_of
from engine.config.refused import RefusedFields
from engine.config.renamed import RenamedFields

SAME = frozenset(
    """output_dir per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs
    max_steps learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_kwargs
    warmup_steps tf32 gradient_checkpointing neftune_noise_alpha logging_strategy
    logging_steps logging_first_step run_name eval_steps eval_delay eval_on_start save_only_model save_strategy
    save_steps save_total_limit load_best_model_at_end greater_is_better restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu
    do_train do_eval do_predict log_level log_level_replica push_to_hub hub_token hub_private_repo hub_model_id
    hub_always_push hub_revision trust_remote_code router_aux_loss_coef dataset_text_field chat_template_path
    eos_token lmbda beta max_new_tokens disable_dropout seq_kd""".split()
)
MAPPED: Mapping[str, str] = MappingProxyType(
    {
        "lr_scheduler_type": "All of transformers' schedules; those that go by a metric read `metric_for_best_model` "
        "after each evaluation. A `scheduler` block of the DeepSpeed JSON gives way.",
        "warmup_ratio": "As in older versions: a share of the steps, where `warmup_steps` is 0.",
        "optim": "AdamW's variants are one AdamW, fused where the device has it (`adamw_apex_fused` is DeepSpeed's); "
        "Lion, Muon, RMSprop and SGD are there. Under ZeRO-3 an optimizer sees flat pieces, so Adafactor and 8-bit "
        "states are refused. An `optimizer` block of the DeepSpeed JSON wins over the default.",
        "optim_args": "Arguments of that optimizer, as `name=value,name=value`; one that it does not take is an error.",
        "label_smoothing_factor": "Smooths the reference tokens' term that `sft_weight` adds; the divergence has no "
        "labels.",
        "temperature": "That of sampling, as in TRL; divides both logits in the loss as well, as in the paper.",
        "bf16": "bfloat16 over fp32 master weights, also on CPU; false computes in fp32.",
        "disable_tqdm": "Plain lines in place of the bar, which is a terminal's alone.",
        "report_to": "wandb unless told otherwise; wandb, tensorboard, several, `all` or `none`. `metrics.jsonl` is "
        "always written.",
        "project": "The wandb project, where `wandb_project` is unset.",
        "eval_strategy": "Unset it reads `no`, yet rows that are there are evaluated at the end; `no` means never.",
        "metric_for_best_model": "Any metric of an evaluation; `loss` and `eval_loss` are the held-out divergence.",
        "hub_strategy": "`end` or `every_save`; the checkpoints themselves are not pushed.",
        "deepspeed": "Path, dict or text of a stage 3 JSON; unset is ZeRO-3 without offload. `auto` is filled in.",
        "resume_from_checkpoint": "Resumes by itself, whether or not the script hands it to `train()`; true is the "
        "newest complete checkpoint, or a fresh start.",
        "overwrite_output_dir": "As in older versions; it removes what an earlier run left in the folder.",
        "model_init_kwargs": "`attn_implementation`, `revision` and `trust_remote_code` of the student by name. "
        "`dtype` decides nothing: ZeRO-3 holds fp32 weights, `bf16` says how they compute. `device_map` and quantized "
        "weights are refused.",
        "teacher_model_name_or_path": "Unset, with no teacher object either, it is an error.",
        "teacher_model_init_kwargs": "The same of the teacher by name; it computes as `bf16` says.",
        "dataset_num_proc": "Unset is one process per core, and one alone for few rows.",
        "max_length": "Completions are cut to fit, prompts never; it has to be a number.",
        "completion_only_loss": "True and unset are the same; false is an error, as no prompt's token counts.",
        "pad_token": "Nothing is padded; the exported tokenizer has it.",
    }
)


class Treatment(NamedTuple):
    """What a field of TRL's does here: `same`, `mapped`, `accepted` or `refused`, and a sentence."""

    kind: str
    sentence: str


def treatments() -> dict[str, Treatment]:
    """Every field that a script for TRL may have, by name, in the order of the four kinds."""
    options = GKDConfig.options()
    table = {name: Treatment("same", option.text) for name, option in options.items() if name in SAME}
    table |= {name: Treatment("mapped", sentence) for name, sentence in MAPPED.items()}
    table |= {name: Treatment("mapped", option.text) for name, option in options_of(RenamedFields).items()}
    table |= {name: Treatment("accepted", option.text) for name, option in options_of(AcceptedFields).items()}
    return table | {name: Treatment("refused", option.text) for name, option in options_of(RefusedFields).items()}


def trl_table() -> str:
    """The table at the end of engine/TRL.md, in Markdown; `python -m engine fields --trl` prints it."""
    lines = ["| field | treatment | |", "| --- | --- | --- |"]
    return "\n".join(
        lines + [f"| `{name}` | {treatment.kind} | {treatment.sentence} |" for name, treatment in treatments().items()]
    )

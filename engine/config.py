"""Configuration: every field, its default, its meaning and its checks.

This file imports neither torch nor DeepSpeed, so `--help` and a misspelt key answer at once. Field names
follow TRL's GKD script and Hugging Face's `TrainingArguments` wherever the same thing exists there.
DeepSpeed's JSON owns ZeRO and offload (engine/zero/settings.py); this file owns batch, optimizer and lengths.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib.util
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.paths import expand_path
from engine.values import as_bool, coerce, plain

DIVERGENCE_KINDS = ("jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "total_variation")
GENERATION_PLACEMENTS = ("gathered", "partitioned")  # `auto` takes one of these
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
TRACKERS = ("wandb", "tensorboard", "all", "none")
# What the engine itself hands to a chat template or to `apply_chat_template`.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
     "continue_final_message", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask",
     "strftime_now", "padding", "truncation", "max_length", "tokenizer_kwargs"}
)  # fmt: skip


TeacherPlacement = Literal["zero3", "replicated", "tensor_parallel"]
TeacherOffload = Literal["none", "between_steps"]


def option(
    default: Any, text: str, choices: tuple | None = None, is_path: bool = False, bools: tuple | None = None
) -> Any:
    """A config field: `text` is its one-sentence documentation (unit and effect).

    In a path, `~` and `${VAR}` are filled in. `bools` is what true and false mean to a field that is not a bool.
    """
    metadata = {"help": text, "choices": choices, "is_path": is_path, "bools": bools}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GKDConfig:
    """Everything a run depends on, apart from the DeepSpeed JSON that `deepspeed` names.

    Raises:
        ValueError: for a value out of range or two fields that contradict each other; the text names the
            field, what was given and what is allowed.
    """

    # Models
    model_name_or_path: str | None = option(None, "Student: hub name or local Hugging Face folder.", is_path=True)
    teacher_model_name_or_path: str | None = option(
        None, "Teacher: hub name or local Hugging Face folder.", is_path=True
    )
    attn_implementation: str = option(
        "sdpa", "Attention kernel of student and teacher.", ("eager", "sdpa", "flash_attention_2")
    )
    trust_remote_code: bool = option(False, "Run model and tokenizer code that a hub repository ships.")
    allow_token_renames: list[str] = option(
        [], "Tokens (id, or name in either tokenizer) whose names may differ between student and teacher."
    )

    # Data
    dataset_name: str | None = option(
        None, "Hub name, local .jsonl/.json/.parquet file, or folder (save_to_disk or data files).", is_path=True
    )
    dataset_config: str | None = option(None, "Configuration name of a hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str | None = option("test", "Split to evaluate on, where there is one; `none`: no evaluation.")
    dataset_streaming: bool = option(False, "Read the training split as a stream; needs `max_steps`.")
    max_length: int = option(
        1024, "Longest prompt plus completion, in tokens; completions are cut to fit, prompts never."
    )
    max_samples: int | None = option(None, "Use only the first so many training rows.")
    chat_template_kwargs: dict[str, Any] = option(
        {}, "Variables of the chat template, such as enable_thinking; a row's own column of that name wins."
    )
    on_bad_row: str = option(
        "error",
        "A row that cannot be used: `error` ends the run before it begins, `skip` leaves it out.",
        ("error", "skip"),
    )
    dataset_num_proc: int | None = option(
        None, "Processes that check and tokenise the rows; unset: one per core, and one alone for few rows."
    )

    # Algorithm (arXiv 2306.13649)
    lmbda: float = option(0.5, "Probability that a step trains on samples that the student generates itself.")
    beta: float = option(0.5, "Generalized JSD weight: 0 is KL(teacher||student), 1 is KL(student||teacher).")
    temperature: float = option(0.9, "Divides both logits in the loss and is the sampling temperature.")
    seq_kd: bool = option(False, "On steps that are not on-policy, the teacher writes the completion.")
    divergence: str = option("jsd", "Divergence between teacher and student.", DIVERGENCE_KINDS)
    skew_alpha: float = option(0.1, "Mixing weight of the skew divergences, in [0, 1).")
    token_clip: float | None = option(
        None, "Cap on one token's divergence, in nats; its gradient is zero where the cap binds."
    )
    sft_weight: float = option(
        0.0, "Weight of the reference tokens' negative log-likelihood, added on steps with dataset completions."
    )
    loss_normalization: str = option(
        "token", "`token`: mean over all response tokens; `sequence`: mean per sequence first.", ("token", "sequence")
    )

    # Generation
    max_new_tokens: int = option(128, "Longest completion that a rollout samples, in tokens.")
    top_p: float = option(1.0, "Nucleus sampling: smallest set of tokens with this much probability.")
    top_k: int = option(0, "Sample among the k most likely tokens; 0 means all.")
    min_p: float = option(0.0, "Sample among tokens with at least this share of the likeliest one's probability.")
    min_new_tokens: int = option(0, "Shortest completion; stop tokens are held back until then.")
    repetition_penalty: float = option(1.0, "Divides the logits of tokens that occurred before; 1 is off.")
    num_generations: int = option(1, "Completions per prompt on an on-policy step; a micro-batch grows by this factor.")
    generation_rows: int = option(64, "Sequences that one rank decodes together; bounds the KV cache.")
    generation_placement: str = option(
        "auto",
        "`gathered`: the whole student on each rank to decode; `partitioned`: layer by layer; `auto`: by free memory.",
        ("auto", *GENERATION_PLACEMENTS),
    )
    rollout_reuse: int = option(1, "Optimizer steps that train on one batch of rollouts.")
    log_completions_steps: int | None = option(
        None, "Steps between tables of prompts, samples and their divergence; unset: none."
    )

    # Optimization
    per_device_train_batch_size: int = option(8, "Sequences of one micro-batch on one rank.")
    per_device_eval_batch_size: int = option(8, "Sequences of one evaluation batch on one rank.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of one optimizer step.")
    global_batch_size: int | None = option(
        None, "Sequences of one optimizer step over all ranks; sets the accumulation steps."
    )
    learning_rate: float = option(2e-5, "Peak learning rate.")
    weight_decay: float = option(0.0, "AdamW weight decay; biases and norms are exempt.")
    adam_beta1: float = option(0.9, "AdamW first-moment decay.")
    adam_beta2: float = option(0.999, "AdamW second-moment decay.")
    adam_epsilon: float = option(1e-8, "AdamW denominator term.")
    max_grad_norm: float = option(1.0, "Clip the global gradient norm to this; 0 switches clipping off.")
    num_train_epochs: float = option(3.0, "Passes over the training rows, where `max_steps` is not set.")
    max_steps: int = option(-1, "Optimizer steps to take; positive overrides `num_train_epochs`.")
    warmup_ratio: float = option(0.0, "Share of the steps over which the learning rate rises.")
    warmup_steps: int = option(0, "Steps over which the learning rate rises; positive overrides `warmup_ratio`.")
    lr_scheduler_type: str = option(
        "linear", "Learning-rate schedule after warm-up (transformers' names).", LR_SCHEDULERS
    )
    bf16: bool = option(True, "Compute in bfloat16 with fp32 master weights; false computes in fp32.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass to save memory.")
    disable_dropout: bool = option(True, "Set every dropout probability of the student to zero.")

    # The loss on the ZeRO-3 partitions
    vocab_parallel_size: int | str = option(
        "auto", "Ranks that together cover the vocabulary; `auto` is the ranks of one node."
    )
    loss_chunk_bytes: int | None = option(
        None, "Memory for one chunk of logits, in bytes; unset: 256 MiB on an accelerator, 32 MiB on CPU."
    )
    compile_loss: str = option(
        "auto",
        "torch.compile for the element-wise part; `auto` compiles on an accelerator.",
        ("auto", "on", "off"),
        bools=("on", "off"),
    )

    # Teacher
    teacher_placement: TeacherPlacement = option(
        "zero3",
        "`zero3` partitions the teacher over all ranks, `tensor_parallel` over a few, `replicated` puts it on each.",
        typing.get_args(TeacherPlacement),
    )
    teacher_tp_size: int = option(1, "Ranks that share a `tensor_parallel` teacher.")
    teacher_deepspeed: dict[str, Any] | str | None = option(
        None,
        "DeepSpeed JSON (path, dict, text) of a `zero3` teacher, for offload; unset: plain ZeRO-3.",
        is_path=True,
    )

    teacher_offload: TeacherOffload = option(
        "none",
        "`between_steps`: a `replicated` teacher and the student's optimizer state take turns on the device.",
        typing.get_args(TeacherOffload),
    )

    # Run
    output_dir: str = option("trainer_output", "Run folder: metrics, checkpoints, export.", is_path=True)
    overwrite_output_dir: bool = option(
        False, "Start anew in a folder that holds an earlier run, whose checkpoints, metrics and export are removed."
    )
    run_name: str | None = option(None, "Name of the run in trackers; unset: WANDB_NAME, else the run folder's name.")
    report_to: list[str] | str = option(
        "wandb", "Trackers beside `metrics.jsonl`, which is always written: one, several, `all` or `none`.", TRACKERS
    )
    wandb_project: str | None = option(None, "wandb project; unset: WANDB_PROJECT, else `gkd-engine`.")
    wandb_entity: str | None = option(None, "wandb team or user; unset: WANDB_ENTITY.")
    wandb_group: str | None = option(None, "wandb run group; unset: WANDB_RUN_GROUP.")
    wandb_tags: list[str] = option([], "wandb tags; unset: WANDB_TAGS.")
    wandb_mode: str = option(
        "auto",
        "`auto` is what WANDB_DISABLED or WANDB_MODE says, else online where a key is set, else offline.",
        ("auto", "online", "offline", "disabled"),
    )
    logging_steps: int = option(10, "Steps between two printed lines; `metrics.jsonl` has every step.")
    eval_steps: int | None = option(
        None, "Steps between evaluations; unset: only at the end, where there is an eval set."
    )
    eval_on_start: bool = option(False, "Evaluate once before the first step.")
    eval_max_samples: int | None = option(None, "Use only the first so many evaluation rows.")
    save_steps: int | None = option(500, "Steps between checkpoints; unset: none.")
    save_minutes: float | None = option(None, "Minutes of wall-clock time between checkpoints; unset: none by time.")
    save_total_limit: int | None = option(None, "Checkpoints to keep; unset: all.")
    save_on_error: str = option(
        "raise", "Where a checkpoint cannot be written: `raise` ends the run, `warn` trains on.", ("raise", "warn")
    )
    max_minutes: float | None = option(
        None, "Minutes of wall-clock time after which the run saves and ends; unset: no limit."
    )
    max_bad_steps: int = option(5, "Steps in a row without a finite loss and gradient that end the run.")
    resume_from_checkpoint: str | None = option(
        None,
        "`auto` or true (newest complete one, or a fresh start) or a checkpoint's path; any number of ranks.",
        is_path=True,
        bools=("auto", None),
    )
    allow_data_change: bool = option(
        False,
        "On resume, take other rows or another seed than the checkpoint's, and begin the data anew; else an error.",
    )
    seed: int = option(42, "Seed of data order, on-policy draws and sampling.")
    deepspeed: dict[str, Any] | str | None = option(
        None, "DeepSpeed JSON (path, dict, text); unset: ZeRO-3 without offload.", is_path=True
    )
    timeout_s: int = option(600, "Seconds after which a collective without an answer ends the run.")
    prepare_timeout_s: int = option(
        7200, "Seconds to wait for the first rank of a host to download models and read the data."
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            name, value = item.name, plain(getattr(self, item.name))
            if item.metadata["bools"] and as_bool(value) is not None:
                value = item.metadata["bools"][0 if as_bool(value) else 1]
            value = coerce(name, value, hints[name])
            choices = item.metadata["choices"]
            for one in value if isinstance(value, list) else [value]:
                if choices is not None and one not in choices:
                    raise ValueError(f"{name}={one!r}: must be one of {', '.join(map(str, choices))}")
            if item.metadata["is_path"] and isinstance(value, str):
                value = expand_path(value, name)
            setattr(self, name, value)
        self.report_to = chosen_trackers(list(self.report_to))

    def _check_ranges(self) -> None:
        def require(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

        require(0 <= self.lmbda <= 1, "lmbda", "in [0, 1]")
        require(0 <= self.beta <= 1, "beta", "in [0, 1]")
        require(0 <= self.skew_alpha < 1, "skew_alpha", "in [0, 1)")
        require(self.temperature > 0, "temperature", "above 0")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(self.top_k >= 0, "top_k", "0 or more")
        require(0 <= self.min_p < 1, "min_p", "in [0, 1)")
        require(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        require(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "between 0 and max_new_tokens")
        require(self.sft_weight >= 0, "sft_weight", "0 or more")
        require(self.token_clip is None or self.token_clip > 0, "token_clip", "above 0, or unset")
        require(self.max_steps == -1 or self.max_steps > 0, "max_steps", "positive, or -1 to use num_train_epochs")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", "in [0, 1]")
        require(self.max_grad_norm >= 0, "max_grad_norm", "0 or more")
        require(self.num_train_epochs > 0, "num_train_epochs", "above 0")
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("max_length", "max_new_tokens", "per_device_train_batch_size", "per_device_eval_batch_size",
                     "teacher_tp_size", "num_generations", "generation_rows", "rollout_reuse", "max_bad_steps",
                     "gradient_accumulation_steps", "logging_steps", "timeout_s", "prepare_timeout_s"):  # fmt: skip
            require(getattr(self, name) > 0, name, "positive")
        for name in ("global_batch_size", "eval_steps", "save_steps", "save_total_limit", "save_minutes", "max_minutes",
                     "loss_chunk_bytes", "max_samples", "eval_max_samples", "log_completions_steps",
                     "dataset_num_proc"):  # fmt: skip
            require(getattr(self, name) is None or getattr(self, name) > 0, name, "positive, or unset")
        size = self.vocab_parallel_size
        require(
            size == "auto" or (isinstance(size, int) and size > 0), "vocab_parallel_size", "`auto` or a positive number"
        )
        require(
            self.max_new_tokens < self.max_length,
            "max_new_tokens",
            f"below max_length={self.max_length}, to leave room for a prompt",
        )
        if self.seq_kd and self.teacher_placement == "tensor_parallel":
            raise ValueError(
                "seq_kd=true needs teacher_placement=zero3 or replicated: a tensor-parallel one cannot write"
            )
        if self.teacher_offload == "between_steps" and self.teacher_placement != "replicated":
            raise ValueError(
                "teacher_offload=between_steps moves a whole teacher; with "
                f"teacher_placement={self.teacher_placement} give teacher_deepspeed an `offload_param` instead "
                "(ds_configs/teacher_zero3_cpu.json)"
            )
        taken = sorted(RESERVED_TEMPLATE_KWARGS & set(self.chat_template_kwargs))
        if taken:
            raise ValueError(f"chat_template_kwargs has `{taken[0]}`, which the engine sets itself")
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise ValueError(
                f"overwrite_output_dir=true removes what resume_from_checkpoint={self.resume_from_checkpoint!r} needs: "
                "set one of them (--resume_from_checkpoint none unsets it)"
            )
        if self.dataset_streaming and self.max_steps < 0:
            raise ValueError("dataset_streaming=true: a stream has no length, so set max_steps as well")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one optimizer step at this world size.

        Raises:
            ValueError: where `global_batch_size` is not a whole number of micro-batches over the ranks.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        per_pass = self.per_device_train_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be split over {world_size} ranks x "
                f"per_device_train_batch_size={self.per_device_train_batch_size}: use a multiple of {per_pass}, "
                "another per_device_train_batch_size, or another number of ranks"
            )
        return self.global_batch_size // per_pass

    def global_batch(self, world_size: int) -> int:
        """Sequences of one optimizer step over all ranks. ValueError as `accumulation_steps`."""
        return self.accumulation_steps(world_size) * self.per_device_train_batch_size * world_size

    def with_global_batch(self, size: int) -> GKDConfig:
        """A copy with that `global_batch_size`; nothing else of it is looked at again."""
        changed = copy.copy(self)
        changed.global_batch_size = size
        return changed

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def chosen_trackers(names: list[str]) -> list[str]:
    """The trackers that `report_to` names: none of them for `none`, every one that is installed for `all`."""
    special = [name for name in names if name in ("all", "none")]
    if special and len(set(names)) > 1:
        raise ValueError(f"report_to={names!r}: `{special[0]}` stands alone")
    if names == ["all"]:
        return [name for name in ("wandb", "tensorboard") if importlib.util.find_spec(name) is not None]
    return [name for name in dict.fromkeys(names) if name != "none"]


def config_from_dict(values: dict[str, Any], source: str = "config") -> GKDConfig:
    """A checked `GKDConfig`; an unknown key raises and names the nearest known one."""
    known = {item.name for item in dataclasses.fields(GKDConfig)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else "; `python -m engine train --help` lists the fields"
            raise ValueError(f"{source}: unknown field `{key}`{hint}")
    return GKDConfig(**values)

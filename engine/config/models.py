"""The sections on models and data. No `from __future__ import annotations`: Python 3.10 cannot read an InitVar then."""

from dataclasses import dataclass
from typing import Any

from engine.config.options import JsonObject, OfTheScript, PathText, option

# What the engine itself hands to a chat template or to `apply_chat_template`.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
     "continue_final_message", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask",
     "strftime_now", "padding", "truncation", "max_length", "tokenizer_kwargs"}
)  # fmt: skip
ATTENTION_KERNELS = ("eager", "sdpa", "flash_attention_2")


@dataclass(kw_only=True)
class ModelFields:
    """Models."""

    model_name_or_path: OfTheScript[PathText | None] = option(None, "Student: hub name or local Hugging Face folder.")
    teacher_model_name_or_path: PathText | None = option(None, "Teacher: hub name or local Hugging Face folder.")
    attn_implementation: OfTheScript[str] = option(
        "sdpa", "Attention kernel of student and teacher.", choices=ATTENTION_KERNELS
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "How the student is loaded by name: dtype, attn_implementation, revision and the like; JSON or a dict."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "The same for a teacher that is loaded by name; unset: nothing of its own."
    )
    trust_remote_code: bool = option(False, "Run model and tokenizer code that a hub repository ships.")
    allow_token_renames: list[str] = option(
        [], "Tokens (id, or name in either tokenizer) whose names may differ between student and teacher."
    )
    disable_dropout: bool = option(True, "Set every dropout probability of the student to zero.")


@dataclass(kw_only=True)
class DataFields:
    """Data."""

    dataset_name: OfTheScript[PathText | None] = option(
        None, "Hub name, local .jsonl/.json/.parquet file, or folder (save_to_disk or data files)."
    )
    dataset_config: OfTheScript[str | None] = option(None, "Configuration name of a hub dataset.")
    dataset_train_split: OfTheScript[str] = option("train", "Split to train on.")
    dataset_test_split: OfTheScript[str | None] = option(
        "test", "Split to evaluate on, where there is one; `none`: no evaluation."
    )
    dataset_streaming: OfTheScript[bool] = option(False, "Read the training split as a stream; needs `max_steps`.")
    dataset_text_field: str = option("text", "Column of rows that have their whole text in one column.")
    dataset_num_proc: int | None = option(
        None, "Processes that check and tokenise the rows; unset: one per core, and one alone for few rows."
    )
    max_length: int = option(
        1024, "Longest prompt plus completion, in tokens; completions are cut to fit, prompts never."
    )
    max_samples: int | None = option(None, "Use only the first so many training rows.")
    chat_template_path: PathText | None = option(
        None, "Chat template: a Jinja file, or the name or folder of a tokenizer that has it; unset: the student's own."
    )
    chat_template_kwargs: JsonObject = option(
        {}, "Variables of the chat template, such as enable_thinking; a row's own column of that name wins."
    )
    eos_token: str | None = option(None, "Token that ends a turn or text; unset: the tokenizer's own.")
    pad_token: str | None = option(None, "Padding token of the exported tokenizer; unset: the tokenizer's own.")
    completion_only_loss: bool | None = option(
        None, "Tokens of a prompt never count, so false is an error; rows of one text are scored whole."
    )
    data_seed: int | None = option(None, "Seed of the order of rows; unset: `seed`.")
    on_bad_row: str = option(
        "error",
        "A row that cannot be used: `error` ends the run before it begins, `skip` leaves it out.",
        choices=("error", "skip"),
    )

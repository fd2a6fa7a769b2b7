"""The sections on a run: its folder, trackers, evaluations, checkpoints, and the hub."""

from dataclasses import dataclass, field
from typing import Annotated

from engine.config.environment import LOG_LEVELS
from engine.config.options import Names, OrDefault, PathText, Words, option

TRACKERS = ("wandb", "tensorboard", "all", "none")
TRANSFORMERS_PROJECT = "huggingface"  # its default, which names nothing here
STRATEGIES = ("no", "steps", "epoch")
HUB_STRATEGIES = ("end", "every_save")


class UnsetStrategy(str):
    """An `eval_strategy` that was not given: it reads as what a script expects, `no` or `steps`, and stays unset."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # so that argparse, which passes defaults through `str`, leaves it what it is


# A section of its own, since the first of all fields stays the first where a script's own class has other defaults.
@dataclass(kw_only=True)
class FolderFields:
    """Run folder."""

    output_dir: OrDefault[PathText] = field(
        default="trainer_output", kw_only=False, metadata={"help": "Run folder: metrics, checkpoints, export."}
    )
    overwrite_output_dir: bool = option(
        False, "Start anew in a folder that holds an earlier run, whose checkpoints, metrics and export are removed."
    )
    resume_from_checkpoint: Annotated[PathText | None, Words("auto", None)] = option(
        None, "`auto` or true (newest complete one, or a fresh start) or a checkpoint's path; any number of ranks."
    )
    allow_data_change: bool = option(
        False,
        "On resume, take other rows or another seed than the checkpoint's, and begin the data anew; else an error.",
    )


@dataclass(kw_only=True)
class RunFields:
    """Run."""

    max_minutes: float | None = option(
        None, "Minutes of wall-clock time after which the run saves and ends; unset: no limit."
    )
    max_bad_steps: int = option(5, "Steps in a row without a finite loss and gradient that end the run.")
    restore_callback_states_from_checkpoint: bool = option(
        False, "On resume, callbacks that are `ExportableState` have the state that they had at the checkpoint."
    )
    timeout_s: int = option(600, "Seconds after which a collective without an answer ends the run.")
    prepare_timeout_s: int = option(
        7200, "Seconds to wait for the first rank of a host to download models and read the data."
    )
    do_train: bool = option(False, "For scripts that ask `args.do_train`; the trainer does not.")
    do_eval: bool = option(False, "For scripts that ask `args.do_eval`; true where `eval_strategy` evaluates.")
    do_predict: bool = option(False, "For scripts that ask `args.do_predict`; the trainer does not.")


@dataclass(kw_only=True)
class LoggingFields:
    """Logging."""

    logging_strategy: str = option("steps", "When a line is printed and logged.", choices=STRATEGIES)
    logging_steps: float = option(
        10, "Steps between two printed lines, below 1 a share of all; `metrics.jsonl` has every step."
    )
    logging_first_step: bool = option(False, "Print and log the first step as well.")
    disable_tqdm: bool | None = option(None, "No progress bar in a terminal but plain lines; unset: a bar.")
    log_level: str = option(
        "passive",
        "What `args.get_process_log_level()` tells a script on a host's first rank.",
        choices=tuple(LOG_LEVELS),
    )
    log_level_replica: str = option("warning", "The same on the other ranks.", choices=tuple(LOG_LEVELS))
    report_to: Names = option(
        "wandb", "Trackers beside `metrics.jsonl`, which is always written: one, several, `all` or `none`."
    )
    run_name: str | None = option(None, "Name of the run in trackers; unset: WANDB_NAME, else the run folder's name.")
    project: str = option(TRANSFORMERS_PROJECT, "The name that transformers has for `wandb_project`, which wins.")
    wandb_project: str | None = option(None, "wandb project; unset: WANDB_PROJECT, else `gkd-engine`.")
    wandb_entity: str | None = option(None, "wandb team or user; unset: WANDB_ENTITY.")
    wandb_group: str | None = option(None, "wandb run group; unset: WANDB_RUN_GROUP.")
    wandb_tags: list[str] = option([], "wandb tags; unset: WANDB_TAGS.")
    wandb_mode: str = option(
        "auto",
        "`auto` is what WANDB_DISABLED or WANDB_MODE says, else online where a key is set, else offline.",
        choices=("auto", "online", "offline", "disabled"),
    )

    @property
    def named_project(self) -> str | None:
        """The project that `wandb_project` or `project` names."""
        return self.wandb_project or (self.project if self.project != TRANSFORMERS_PROJECT else None)


@dataclass(kw_only=True)
class EvaluationFields:
    """Evaluation and checkpoints."""

    eval_strategy: OrDefault[str] = option(
        UnsetStrategy("no"),
        "When to evaluate; unset: every `eval_steps` and at the end, where there are rows; `no`: never.",
        choices=STRATEGIES,
    )
    eval_steps: float | None = option(
        None, "Steps between evaluations, below 1 a share of all; unset: only at the end, where there is an eval set."
    )
    eval_delay: float = option(0, "Steps (or epochs, where these are the strategy) before the first evaluation.")
    eval_on_start: bool = option(False, "Evaluate once before the first step.")
    eval_max_samples: int | None = option(None, "Use only the first so many evaluation rows.")
    load_best_model_at_end: bool = option(False, "Keep the best checkpoint, and end with its weights.")
    metric_for_best_model: str | None = option(
        None, "Metric of an evaluation that tells the best checkpoint; unset: the loss, where it is asked for."
    )
    greater_is_better: bool | None = option(
        None, "Whether more of that metric is better; unset: by its name, less of a loss, divergence or perplexity."
    )
    save_strategy: str = option("steps", "When to write a checkpoint.", choices=(*STRATEGIES, "best"))
    save_steps: float | None = option(500, "Steps between checkpoints, below 1 a share of all; unset: none.")
    save_minutes: float | None = option(None, "Minutes of wall-clock time between checkpoints; unset: none by time.")
    save_total_limit: int | None = option(None, "Checkpoints to keep; unset: all.")
    save_only_model: bool = option(
        False, "Checkpoints are Hugging Face folders of the model alone; nothing can be resumed from them."
    )
    save_on_error: str = option(
        "raise", "Where a checkpoint cannot be written: `raise` ends the run, `warn` trains on.", ("raise", "warn")
    )


@dataclass(kw_only=True)
class HubFields:
    """Hub."""

    push_to_hub: bool = option(False, "Push the exported student to the Hugging Face hub.")
    hub_model_id: str | None = option(None, "Repository to push to; unset: the run folder's name, of the token's user.")
    hub_strategy: str = option(
        "every_save", "Push at the end alone, or with each checkpoint as well.", choices=HUB_STRATEGIES
    )
    hub_token: str | None = option(None, "Token of the hub; unset: as you are logged in.", is_secret=True)
    hub_private_repo: bool | None = option(
        None, "Whether a repository that is made anew is private; unset: the hub's rule."
    )
    hub_always_push: bool = option(False, "Push also while an earlier push is under way.")
    hub_revision: str | None = option(None, "Branch to push to; unset: the default branch.")

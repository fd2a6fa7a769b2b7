"""What values of fields are allowed: ranges, and fields that contradict each other.

A rule is asked only where the types of its fields are right, so that one mistake is told once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from engine.config.accepted import AcceptedFields
from engine.config.models import RESERVED_TEMPLATE_KWARGS
from engine.config.optimizers import optimizer_problem
from engine.config.options import options_of
from engine.config.refused import HARMLESS, RefusedFields
from engine.config.source import init_kwargs_problem

POSITIVE = """max_length max_new_tokens per_device_train_batch_size per_device_eval_batch_size teacher_tp_size
    num_generations generation_rows rollout_reuse max_bad_steps gradient_accumulation_steps timeout_s
    prepare_timeout_s""".split()
POSITIVE_OR_UNSET = """global_batch_size eval_steps save_steps save_total_limit save_minutes max_minutes
    loss_chunk_bytes max_samples eval_max_samples log_completions_steps dataset_num_proc""".split()
NOT_NEGATIVE = "learning_rate weight_decay warmup_steps sft_weight top_k max_grad_norm eval_delay".split()
# Below 1 these are a share of the run's steps.
STEPS = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
DATASET_KWARGS = ("skip_prepare_dataset", "append_concat_token")


@dataclasses.dataclass(frozen=True)
class Rule:
    """`is_met` of a configuration; where not, `sentence` of it is the error. `names` are the fields it reads."""

    names: tuple[str, ...]
    is_met: Callable[[Any], bool]
    sentence: Callable[[Any], str]


def _must(name: str, is_met: Callable[[Any], bool], allowed: str, *others: str) -> Rule:
    def sentence(config: Any) -> str:
        return f"{name}={getattr(config, name)!r}: must be {allowed.format_map(vars(config))}"

    return Rule((name, *others), is_met, sentence)


def _ranges() -> Iterator[Rule]:
    def is_positive(name: str) -> Callable[[Any], bool]:
        return lambda c: getattr(c, name) is None or getattr(c, name) > 0

    yield _must("lmbda", lambda c: 0 <= c.lmbda <= 1, "in [0, 1]")
    yield _must("beta", lambda c: 0 <= c.beta <= 1, "in [0, 1]")
    yield _must("skew_alpha", lambda c: 0 <= c.skew_alpha < 1, "in [0, 1)")
    yield _must("temperature", lambda c: c.temperature > 0, "above 0")
    yield _must("top_p", lambda c: 0 < c.top_p <= 1, "in (0, 1]")
    yield _must("min_p", lambda c: 0 <= c.min_p < 1, "in [0, 1)")
    yield _must("repetition_penalty", lambda c: c.repetition_penalty > 0, "above 0")
    yield _must(
        "min_new_tokens", lambda c: 0 <= c.min_new_tokens <= c.max_new_tokens, "between 0 and max_new_tokens",
        "max_new_tokens",
    )  # fmt: skip
    yield _must("token_clip", lambda c: c.token_clip is None or c.token_clip > 0, "above 0, or unset")
    yield _must("max_steps", lambda c: c.max_steps == -1 or c.max_steps > 0, "positive, or -1 to use num_train_epochs")
    yield _must("warmup_ratio", lambda c: 0 <= c.warmup_ratio <= 1, "in [0, 1]")
    yield _must("label_smoothing_factor", lambda c: 0 <= c.label_smoothing_factor < 1, "in [0, 1)")
    yield _must("num_train_epochs", lambda c: c.num_train_epochs > 0, "above 0")
    yield _must("logging_steps", is_positive("logging_steps"), "positive; logging_strategy=no logs nothing")
    for name in POSITIVE:
        yield _must(name, is_positive(name), "positive")
    for name in POSITIVE_OR_UNSET:
        yield _must(name, is_positive(name), "positive, or unset")
    for name in ("neftune_noise_alpha", "router_aux_loss_coef"):
        yield _must(name, lambda c, name=name: (getattr(c, name) or 0) >= 0, "0 or more, or unset")  # type: ignore[misc]
    for name in NOT_NEGATIVE:
        yield _must(name, lambda c, name=name: getattr(c, name) >= 0, "0 or more")  # type: ignore[misc]
    for name in STEPS:
        yield _must(
            name,
            lambda c, name=name: (getattr(c, name) or 0) <= 1 or float(getattr(c, name)).is_integer(),  # type: ignore[misc]
            "a whole number of steps, or below 1 for a share of all",
        )
    yield _must(
        "vocab_parallel_size",
        lambda c: (
            c.vocab_parallel_size == "auto" or isinstance(c.vocab_parallel_size, int) and c.vocab_parallel_size > 0
        ),
        "`auto` or a positive number",
    )
    yield _must(
        "max_new_tokens", lambda c: c.max_new_tokens < c.max_length,
        "below max_length={max_length}, to leave room for a prompt", "max_length",
    )  # fmt: skip


def _contradictions() -> Iterator[Rule]:
    """Fields that say opposite things."""
    yield Rule(
        ("seq_kd", "teacher_placement"),
        lambda c: not (c.seq_kd and c.teacher_placement == "tensor_parallel"),
        lambda c: "seq_kd=true needs teacher_placement=zero3 or replicated: a tensor-parallel one cannot write",
    )
    yield Rule(
        ("teacher_offload", "teacher_placement"),
        lambda c: c.teacher_offload != "between_steps" or c.teacher_placement == "replicated",
        lambda c: (
            "teacher_offload=between_steps moves a whole teacher; with "
            f"teacher_placement={c.teacher_placement} give teacher_deepspeed an `offload_param` instead "
            "(ds_configs/teacher_zero3_cpu.json)"
        ),
    )
    yield Rule(
        ("overwrite_output_dir", "resume_from_checkpoint"),
        lambda c: not c.overwrite_output_dir or c.resume_from_checkpoint is None,
        lambda c: (
            f"overwrite_output_dir=true removes what resume_from_checkpoint={c.resume_from_checkpoint!r} needs: "
            "set one of them (--resume_from_checkpoint none unsets it)"
        ),
    )
    yield Rule(
        ("dataset_streaming", "max_steps"),
        lambda c: not c.dataset_streaming or c.max_steps >= 0,
        lambda c: "dataset_streaming=true: a stream has no length, so set max_steps as well",
    )
    yield Rule(
        ("label_smoothing_factor", "sft_weight"),
        lambda c: not c.label_smoothing_factor or c.sft_weight > 0,
        lambda c: (
            f"label_smoothing_factor={c.label_smoothing_factor} smooths the likelihood term, which sft_weight=0 leaves "
            "out: set sft_weight, or remove it (a divergence has the teacher's distribution, and no labels)"
        ),
    )
    yield Rule(
        ("completion_only_loss",),
        lambda c: c.completion_only_loss is not False,
        lambda c: (
            "completion_only_loss=false: tokens of a prompt never count; rows of one text (dataset_text_field) are "
            "scored whole, with lmbda=0"
        ),
    )
    yield Rule(
        ("lr_scheduler_type", "eval_strategy"),
        lambda c: c.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy") or c.eval_strategy != "no",
        lambda c: f"lr_scheduler_type={c.lr_scheduler_type} goes by evaluations: set eval_strategy to steps or epoch",
    )


def _arguments() -> Iterator[Rule]:
    """Arguments for others, of which each is used or refused."""
    yield Rule(
        ("chat_template_kwargs",),
        lambda c: not RESERVED_TEMPLATE_KWARGS & set(c.chat_template_kwargs),
        lambda c: (
            f"chat_template_kwargs has `{min(RESERVED_TEMPLATE_KWARGS & set(c.chat_template_kwargs))}`, "
            "which the engine sets itself"
        ),
    )
    yield Rule(
        ("gradient_checkpointing_kwargs",),
        lambda c: c.gradient_checkpointing_kwargs in (None, {}, {"use_reentrant": False}),
        lambda c: (
            f"gradient_checkpointing_kwargs={c.gradient_checkpointing_kwargs!r}: use_reentrant=false alone is allowed, "
            "and is so anyhow: under ZeRO-3 activations are recomputed without re-entering autograd"
        ),
    )
    yield Rule(
        ("dataset_kwargs",),
        lambda c: not _unknown_dataset_kwargs(c),
        lambda c: (
            f"dataset_kwargs={c.dataset_kwargs!r}: {', '.join(_unknown_dataset_kwargs(c))} has no meaning here; "
            f"allowed are {', '.join(DATASET_KWARGS)}, and add_special_tokens=false"
        ),
    )
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        yield Rule(
            (name,),
            lambda c, name=name: init_kwargs_problem(name, getattr(c, name)) is None,  # type: ignore[misc]
            lambda c, name=name: str(init_kwargs_problem(name, getattr(c, name))),  # type: ignore[misc]
        )
    yield Rule(
        ("optim", "optim_args"),
        lambda c: optimizer_problem(c.optim, c.optim_args) is None,
        lambda c: str(optimizer_problem(c.optim, c.optim_args)),
    )


def _best_model() -> Iterator[Rule]:
    """As transformers has them: what is best is known where an evaluation and a checkpoint meet."""
    names = ("load_best_model_at_end", "save_strategy", "eval_strategy")
    yield Rule(
        names,
        lambda c: not c.load_best_model_at_end or c.save_strategy in ("best", c.eval_strategy),
        lambda c: (
            f"load_best_model_at_end=true with eval_strategy={c.eval_strategy} and save_strategy={c.save_strategy}: "
            "make the two equal, or set save_strategy=best"
        ),
    )
    yield Rule(
        (*names, "save_steps", "eval_steps"),
        lambda c: not (c.load_best_model_at_end and c.save_strategy == c.eval_strategy == "steps") or _is_multiple(c),
        lambda c: (
            f"load_best_model_at_end=true with save_steps={c.save_steps}, eval_steps={c.eval_steps}: save_steps must "
            "be a multiple of eval_steps, both whole or both a share of the steps"
        ),
    )
    yield Rule(
        ("load_best_model_at_end", "save_only_model"),
        lambda c: not (c.load_best_model_at_end and c.save_only_model),
        lambda c: (
            "load_best_model_at_end=true with save_only_model=true: ZeRO-3 takes weights back from a whole checkpoint "
            "alone. save_strategy=best keeps each best model without loading it"
        ),
    )
    yield Rule(
        ("metric_for_best_model", "greater_is_better"),
        lambda c: c.metric_for_best_model is None or c.greater_is_better is not None,
        lambda c: (
            f"metric_for_best_model={c.metric_for_best_model!r}: its name does not tell which way is better: "
            "set greater_is_better"
        ),
    )
    yield Rule(
        ("eval_strategy", "save_strategy"),
        lambda c: c.save_strategy != "best" or c.eval_strategy != "no",
        lambda c: "save_strategy=best goes by evaluations: set eval_strategy to steps or epoch",
    )


def _is_multiple(config: Any) -> bool:
    save_steps, eval_steps = config.save_steps, config.eval_steps
    if save_steps is None or eval_steps is None or (save_steps < 1) != (eval_steps < 1):
        return False
    ratio = save_steps / eval_steps
    return abs(ratio - round(ratio)) < 1e-6 and ratio >= 1


def _unknown_dataset_kwargs(config: Any) -> list[str]:
    given = config.dataset_kwargs or {}
    return [key for key, value in given.items() if key not in DATASET_KWARGS and (key != "add_special_tokens" or value)]


RULES = (*_ranges(), *_contradictions(), *_arguments(), *_best_model())


def broken_rules(config: Any, unreadable: set[str]) -> list[str]:
    """A sentence for each rule that the configuration does not meet, but for rules that read an `unreadable` field."""
    rules = (rule for rule in RULES if not unreadable & set(rule.names))
    return [rule.sentence(config) for rule in rules if not rule.is_met(config)]


def refusals(config: Any) -> list[str]:
    """A sentence for each refused field that is set."""
    return [
        f"{name}={getattr(config, name)!r} is not supported. {option.text}"
        for name, option in options_of(RefusedFields).items()
        if is_set(getattr(config, name), option.default) and getattr(config, name) not in HARMLESS.get(name, ())
    ]


def accepted_sentence(config: Any) -> str | None:
    """One line on all fields that are set and change nothing here; None where there is none."""
    given = [
        f"{n} ({o.text[:-1]})" for n, o in options_of(AcceptedFields).items() if is_set(getattr(config, n), o.default)
    ]
    return f"these fields change nothing here: {'; '.join(given)}" if given else None


def is_set(value: Any, default: Any) -> bool:
    """Whether a value is another than the default; one that is off is no other than one that is unset."""
    return value != default and not (_is_off(value) and _is_off(default))


def _is_off(value: Any) -> bool:
    return not value or value == "no"

"""`GKDConfig`: every field of a run, checked. What a field means stands in the sections that it is made of."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from engine.config.accepted import AcceptedFields
from engine.config.algorithm import AlgorithmFields, GenerationFields, PartitionFields
from engine.config.checks import STEPS, accepted_sentence, broken_rules, is_set, refusals
from engine.config.environment import Environment
from engine.config.models import DataFields, ModelFields
from engine.config.options import Option, options_of
from engine.config.reading import read_value, saved_value
from engine.config.refused import RefusedFields
from engine.config.renamed import RENAMED, RenamedFields
from engine.config.run import (
    EvaluationFields,
    FolderFields,
    HubFields,
    LoggingFields,
    RunFields,
    UnsetStrategy,
)
from engine.config.training import TrainingFields
from engine.values import plain

# What a file of a run never holds: what is the process's own, and secrets.
NEVER_SAVED = frozenset({"local_rank", "hub_token", *RENAMED, "push_to_hub_organization"})


# A dataclass takes its fields from the last base to the first.
@dataclasses.dataclass(kw_only=True, repr=False)
class GKDConfig(
    RefusedFields,
    AcceptedFields,
    RenamedFields,
    HubFields,
    EvaluationFields,
    LoggingFields,
    RunFields,
    PartitionFields,
    TrainingFields,
    GenerationFields,
    AlgorithmFields,
    DataFields,
    ModelFields,
    FolderFields,
    Environment,
):
    """Everything a run depends on, apart from the DeepSpeed JSON that `deepspeed` names.

    `output_dir` may come first without its name. Fields of TRL's script are here under their own names
    (engine/TRL.md). Imports neither torch nor transformers.

    Raises:
        ValueError: for a field that is unknown, of another type, out of range, refused, or contradicts another. The
            text has a line for each: the field, what was given, and what is allowed.
    """

    def __new__(cls, *values: Any, **fields: Any) -> GKDConfig:
        """Looks at the names alone, which Python would call a TypeError, one at a time."""
        unknown = [f"unknown field `{name}`{nearest(name, cls)}" for name in fields if name not in cls.options()]
        if not unknown:
            return super().__new__(cls)
        try:
            cls(*values, **{name: value for name, value in fields.items() if name in cls.options()})
        except ValueError as error:
            unknown.append(str(error))
        raise ValueError("\n".join(unknown))

    def __post_init__(self, *of_script: Any) -> None:
        names = [name for name, option in self.options().items() if option.is_of_script]
        for name, value in zip(names, of_script, strict=True):
            setattr(self, name, value)
        problems = self._read_values()
        unreadable = set(problems)
        sentences = list(problems.values())
        if not sentences:
            sentences += self._rename()
        self._fill_in(unreadable)
        sentences += refusals(self) + broken_rules(self, unreadable)
        if sentences:
            raise ValueError("\n".join(sentences))

    @classmethod
    def options(cls) -> Mapping[str, Option]:
        """Every field by name, section after section; `dataclasses.fields` lacks what TRL's scripts have themselves."""
        kind: Any = cls  # mypy: a class whose instances are not hashable is
        return options_of(kind)

    def _read_values(self) -> dict[str, str]:
        """Turn each value into one of its type; what is wrong, by name of the field."""
        problems = {}
        for name, option in self.options().items():
            if name not in GKDConfig.options():
                continue  # a field that a script's own class adds
            value = plain(getattr(self, name))
            try:
                value = read_value(option, value)
            except ValueError as error:
                if option.section is not RefusedFields:  # whose own sentence is the answer, whatever it is
                    problems[name] = str(error)
            if option.section in (AcceptedFields, RefusedFields) and not is_set(value, option.default):
                value = option.default  # one way to be off
            setattr(self, name, value)
        return problems

    def _rename(self) -> list[str]:
        """Move what came by another name; a sentence for each that came by two, and differs."""
        problems, options = [], self.options()
        if self.push_to_hub_organization is not None:
            own = self.push_to_hub_model_id or self.output_dir.rstrip("/").rpartition("/")[2]
            self.push_to_hub_model_id, self.push_to_hub_organization = f"{self.push_to_hub_organization}/{own}", None
        for old, new in RENAMED.items():
            given, value = getattr(self, old), getattr(self, new)
            if given is None:
                continue
            if is_set(value, options[new].default) and value != given:
                shown = "two values" if options[new].is_secret else f"{given!r} and {value!r}"
                problems.append(f"{old} and {new} are one field, and got {shown}: give {new} alone")
                continue
            try:
                setattr(self, new, read_value(options[new], given))
            except ValueError as error:
                problems.append(f"{old}: {error}")
            setattr(self, old, None)
        return problems

    def _fill_in(self, unreadable: set[str]) -> None:
        """What follows from other fields."""
        for name in STEPS:
            value = getattr(self, name)
            if name not in unreadable and isinstance(value, float) and value.is_integer():
                setattr(self, name, int(value))
        if self.save_total_limit == 0:  # no limit, in transformers
            self.save_total_limit = None
        if isinstance(self.eval_strategy, UnsetStrategy):
            self.eval_strategy = UnsetStrategy("no" if self.eval_steps is None else "steps")
        elif self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        self.do_eval = self.do_eval or self.eval_strategy != "no"
        goes_by_metric = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and (
            goes_by_metric or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        ):
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_more_better(self.metric_for_best_model)

    @property
    def has_eval_strategy(self) -> bool:
        """Whether `eval_strategy` was given; else the engine's rule counts, whatever it reads as."""
        return not isinstance(self.eval_strategy, UnsetStrategy)

    @property
    def accepted_sentence(self) -> str | None:
        """One line on all fields that are set and change nothing here; None where there is none."""
        return accepted_sentence(self)

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

    def with_resume(self, wanted: str) -> GKDConfig:
        """A copy that resumes from there; nothing else of it is looked at again."""
        changed = copy.copy(self)
        changed.resume_from_checkpoint = wanted
        return changed

    def checked_copy(self) -> GKDConfig:
        """A copy in which what a script has set since, as `args.model_init_kwargs = ...`, is read and checked as well.

        Raises:
            ValueError: as the constructor.
        """
        return dataclasses.replace(self)

    def to_dict(self) -> dict[str, Any]:
        """What gives the same configuration again, as plain values: `GKDConfig(**config.to_dict())`.

        Fields that change nothing here are in it where they are set. The hub's token is not. An object among arguments
        of a model is the name of its class.
        """
        values = {}
        for name, option in self.options().items():
            value = getattr(self, name)
            if name in NEVER_SAVED or option.section in (AcceptedFields, RefusedFields) and value == option.default:
                continue
            values[name] = saved_value(value)
        return values

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """As TensorBoard's hyperparameters: numbers, truth values, and text for all else."""
        values = self.to_dict() | {"train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in values.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GKDConfig):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.options())

    def __repr__(self) -> str:
        """The fields that are not at their default."""
        shown = (
            f"{name}={getattr(self, name)!r}"
            for name, option in self.options().items()
            if not option.is_secret and getattr(self, name) != option.default
        )
        return f"GKDConfig({', '.join(shown)})"


def is_more_better(metric: str) -> bool | None:
    """Whether more of an evaluation's metric is better, by its name; None where neither is."""
    if metric.endswith("mean_length"):
        return None
    return not metric.endswith(("loss", "divergence", "divergence_on_policy", "perplexity"))


def nearest(name: Any, kind: type[GKDConfig] = GKDConfig) -> str:
    """What the user may have meant by an unknown field."""
    near = difflib.get_close_matches(str(name), kind.options(), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else "; `python -m engine train --help` lists the fields"


def config_from_dict(values: dict[str, Any], source: str = "config") -> GKDConfig:
    """A checked `GKDConfig`; unknown keys raise and name the nearest known ones, and `source`."""
    unknown = [f"{source}: unknown field `{key}`{nearest(key)}" for key in values if key not in GKDConfig.options()]
    try:
        config = GKDConfig(**{key: value for key, value in values.items() if key in GKDConfig.options()})
    except ValueError as error:
        raise ValueError("\n".join([*unknown, str(error)])) from None
    if unknown:
        raise ValueError("\n".join(unknown))
    return config

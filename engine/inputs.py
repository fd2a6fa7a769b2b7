"""Reading the input: configurations, tokenizers and rows, and everything that can be wrong with them.

Before a model's weights are read, and before anything is built. No collectives: `assembly` says which rank reads when.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from datasets import DatasetDict
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.checkpoint.parts import check_saveable, export_parts
from engine.cluster.logs import bars_on_console
from engine.config import GKDConfig
from engine.config.source import ModelSource, student_source, teacher_source
from engine.data.batch import Sample
from engine.data.chat import stop_token_ids
from engine.data.encoding import Format
from engine.data.samples import StepData, build_rows, eval_batches
from engine.data.selection import MapRows, StreamRows
from engine.data.sources import has_split
from engine.data.template import TemplateInput
from engine.data.tokenizer import (
    TokenizerChanges,
    load_tokenizer,
    load_tokenizer_at_hand,
    plain_tokenizer,
    prepare_tokenizer,
)
from engine.data.vocabulary import check_ids, check_same_vocabulary
from engine.models.backbone import (
    build_on_meta,
    check_positions,
    check_usable,
    download_model,
    read_generation_config,
    read_model_config,
)

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a run is given beside its configuration; None means the configuration names it."""

    model: nn.Module | None = None
    teacher_model: nn.Module | None = None
    tokenizer: Any = None  # or a processor
    train_dataset: Any = None
    eval_dataset: Any = None
    teacher_tokenizer: Any = None  # or a processor
    formatting_func: Format | None = None  # makes a row of what a dataset has
    optimizer: Any = None  # over the weights of `model`
    scheduler: Any = None  # of that optimizer, or a function that makes one for an optimizer


@dataclass
class Read:
    """What a rank has read and checked before it builds anything."""

    shared_vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    data: StepData | None = None
    evaluation_sets: dict[str, list[list[Sample]]] = field(default_factory=dict)  # by name; the only one has none
    num_steps: int = 1
    fingerprints: dict[str, str] = field(default_factory=dict)  # by split, and name of the set
    # `train` and `eval`: the split, and its usable rows; None of a stream
    num_rows: dict[str, tuple[str, int | None]] = field(default_factory=dict)


@dataclass
class Reader:
    """Reads for one rank. `now` is what a chat template takes for today; without `train`, rows to evaluate on alone."""

    config: GKDConfig
    inputs: Inputs
    train: bool
    rank: int
    world_size: int
    now: datetime

    def read(self) -> Read:
        """Read and check, and download what is missing.

        Raises:
            ValueError: for input that cannot work.
        """
        config, inputs = self.config, self.inputs
        student_config = self._model_config(inputs.model, student_source)
        teacher_config = self._model_config(inputs.teacher_model, teacher_source)
        for who, model_config in (("student", student_config), ("teacher", teacher_config)):
            check_positions(model_config, config.max_length, who, self.rank == 0)
        shared_vocab_size = min(c.get_text_config().vocab_size for c in (student_config, teacher_config))
        read = Read(shared_vocab_size, self._tokenizer(shared_vocab_size))
        if self.wants_evaluation and inputs.train_dataset is not None and inputs.eval_dataset is None:
            raise ValueError(
                "eval_strategy, eval_steps or eval_on_start is set, and train_dataset= came without eval_dataset=: "
                "pass both"
            )
        if self.train:
            self._check_export(student_config, read.tokenizer)
            self._read_training_rows(read)
        self._read_evaluation_rows(read)
        for given, source_of in ((inputs.model, student_source), (inputs.teacher_model, teacher_source)):
            if given is None:
                download_model(source_of(config))
        return read

    @property
    def wants_evaluation(self) -> bool:
        return not self.train or self.config.eval_strategy != "no" or self.config.eval_on_start

    def _model_config(self, model: nn.Module | None, source_of: Callable[[GKDConfig], ModelSource]) -> Any:
        """The model's configuration, after the check that its class can be used."""
        if model is None:
            source = source_of(self.config)
            model = build_on_meta(source, read_model_config(source))
        check_usable(model, longest_row(self.config))
        return model.config

    def _check_export(self, student_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """What is saved beside the weights can be saved, which must not show at the first checkpoint."""
        if self.inputs.model is not None:
            settings = self.inputs.model.generation_config
        else:
            settings = read_generation_config(student_source(self.config), student_config)
        stop_ids = stop_ids_of(self.config, tokenizer, settings)
        check_saveable(export_parts(student_config, settings, tokenizer, stop_ids))

    def _rows(self, data: Any, split: str, read: Read, label: str | None = None) -> MapRows | StreamRows:
        with bars_on_console():
            rows = build_rows(
                data, read.tokenizer, self.config, split, self.rank, self.now, read.shared_vocab_size,
                self.inputs.formatting_func,
            )  # fmt: skip
        read.fingerprints[label or split] = rows.fingerprint
        return rows

    def _read_training_rows(self, read: Read) -> None:
        split = self.config.dataset_train_split
        rows = self._rows(self.inputs.train_dataset, split, read)
        if self.config.loss_normalization == "trl" and rows.rules.answers != "all":
            if isinstance(rows, StreamRows) or rows.has_bare_prompts:
                raise ValueError(
                    "loss_normalization=trl divides by the tokens of the dataset's answers, and rows without one have "
                    "none (of a stream that cannot be known): use loss_normalization=token"
                )
        read.data = StepData(rows, self.config, self.world_size, self.rank)
        if not read.data.has_length:
            check_has_no_epochs(self.config)
        read.num_rows["train"] = split, len(rows) if isinstance(rows, MapRows) else None
        read.num_steps = count_steps(self.config, read.data)

    def _read_evaluation_rows(self, read: Read) -> None:
        """The rows to evaluate on, where that is asked for, or they are there anyhow."""
        config, given = self.config, self.inputs.eval_dataset
        split = config.dataset_test_split or "test"
        if given is None and config.dataset_test_split is None:
            if self.wants_evaluation:
                raise ValueError(
                    "evaluation is asked for, and dataset_test_split is none: name the split to evaluate on"
                )
            return
        if given is None and not self.wants_evaluation:
            if self.inputs.train_dataset is not None or not has_split(config, split):
                return
        self.read_evaluation_sets(given, read)

    def read_evaluation_sets(self, given: Any, read: Read) -> None:
        """Rows to evaluate on: a dataset, or a dict of them by name; None for those that the configuration names."""
        split = self.config.dataset_test_split or "test"
        has_names = isinstance(given, dict) and not isinstance(given, DatasetDict)
        if has_names and not given:
            raise ValueError("eval_dataset={}: no dataset to evaluate on")
        for name, data in (given if has_names else {"": given}).items():
            label = f"{split} {name}".rstrip()
            rows = self._rows(data, split, read, label)
            assert isinstance(rows, MapRows)  # `build_rows` refuses a stream to evaluate on
            batch_size = self.config.per_device_eval_batch_size
            read.evaluation_sets[name] = eval_batches(rows, self.rank, self.world_size, batch_size)
            read.num_rows[f"eval {name}".rstrip()] = label, len(rows)

    def _tokenizer(self, shared_vocab_size: int) -> PreTrainedTokenizerBase:
        """The student's tokenizer, which the teacher must share."""
        config, given = self.config, self.inputs.tokenizer
        changes = TokenizerChanges(config.chat_template_path, config.eos_token, config.pad_token)
        if given is not None:
            tokenizer = prepare_tokenizer(plain_tokenizer(given), changes)
        elif config.model_name_or_path is not None:
            source = student_source(config)
            tokenizer = load_tokenizer(source.name, source.trust_remote_code, source.revision, changes)
        else:
            raise ValueError("a model object came without its tokenizer: pass processing_class=")
        # more ids than rows are no fault of their own
        check_ids(stop_token_ids(tokenizer), shared_vocab_size, tokenizer)
        teacher_tokenizer = self._teacher_tokenizer()
        if teacher_tokenizer is None:
            logger.warning(
                "the teacher came as an object without a tokenizer: that its ids mean what the student's do was not "
                "checked. Pass teacher_processing_class="
            )
        else:
            check_same_vocabulary(tokenizer, teacher_tokenizer, config.allow_token_renames)
        return tokenizer

    def _teacher_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer; None for an object that nobody knows the tokenizer of."""
        config, inputs = self.config, self.inputs
        if inputs.teacher_tokenizer is not None:
            return plain_tokenizer(inputs.teacher_tokenizer)
        if inputs.teacher_model is None:
            source = teacher_source(config)
            return load_tokenizer(source.name, source.trust_remote_code, source.revision)
        return load_tokenizer_at_hand(inputs.teacher_model.config.name_or_path, config.trust_remote_code)


def check_objects(config: GKDConfig, inputs: Inputs) -> None:
    """What comes as an object, and what the configuration says of the same thing.

    Raises:
        ValueError: where the two contradict each other.
    """
    fields = GKDConfig.options()
    for model, name in ((inputs.model, "model"), (inputs.teacher_model, "teacher_model")):
        if model is not None and getattr(config, f"{name}_init_kwargs") is not None:
            raise ValueError(
                f"{name}_init_kwargs says how a model is loaded by name, and {name}= came as an object: leave it out, "
                "or give the name"
            )
    if inputs.optimizer is not None:
        for name in ("optim", "optim_args"):
            if getattr(config, name) != fields[name].default:
                raise ValueError(
                    f"{name}={getattr(config, name)!r}, and optimizers= has an optimizer: give one of the two"
                )
        if inputs.model is None:
            raise ValueError(
                "optimizers= has an optimizer, and the student comes by name: hand over the model object whose "
                "parameters() it was made of, or set `optim`"
            )


def longest_row(config: GKDConfig) -> int:
    """Most tokens that a micro-batch packs into one row."""
    train = config.per_device_train_batch_size * config.num_generations * config.teacher_tp_size  # scored together
    return config.max_length * max(train, config.per_device_eval_batch_size)


def check_has_no_epochs(config: GKDConfig) -> None:
    """Raise ValueError where something is to happen at the end of an epoch, which a stream does not have."""
    names = ("logging_strategy", "eval_strategy", "save_strategy")
    given = [name for name in names if getattr(config, name) == "epoch"]
    if given:
        raise ValueError(f"{', '.join(given)}: epoch, and a stream has no epochs: use steps")


def count_steps(config: GKDConfig, data: StepData) -> int:
    """Optimizer steps of the run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * data.steps_per_epoch)


def stop_ids_of(config: GKDConfig, tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Ids at which the student stops, in rollouts and once it is exported."""
    template = TemplateInput(kwargs=config.chat_template_kwargs)
    return stop_token_ids(tokenizer, generation_config.eos_token_id, template)

"""Assembly: from a configuration (and, in Python, model and dataset objects) to the parts of a run.

Everything that can be wrong with the input is checked before a model's weights are read.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine import check
from engine.checkpoint import run_folder
from engine.checkpoint.checkpoint import Checkpoints
from engine.checkpoint.parts import check_saveable, export_parts
from engine.checkpoint.resumption import Resumption, check_inputs, find_resumption
from engine.cluster import hosts
from engine.cluster.agreement import from_main, together
from engine.cluster.collectives import build_vocab_groups
from engine.cluster.startup import init_distributed
from engine.config import GKDConfig
from engine.data.batch import Sample
from engine.data.chat import stop_token_ids
from engine.data.samples import StepData, build_rows, eval_batches
from engine.data.selection import MapRows
from engine.data.sources import has_split
from engine.data.template import TemplateInput
from engine.data.tokenizer import load_tokenizer, load_tokenizer_at_hand, plain_tokenizer, prepare_tokenizer
from engine.data.vocabulary import check_ids, check_same_vocabulary
from engine.evaluation import Evaluator
from engine.loss.objective import Objective
from engine.models.backbone import (
    build_on_meta,
    check_positions,
    check_usable,
    download_model,
    read_generation_config,
    read_model_config,
)
from engine.models.student import Student, build_student
from engine.rollout.rollout import Rollout
from engine.rollout.sampling import Sampling
from engine.teacher.interface import Teacher
from engine.teacher.placements import build_teacher
from engine.tracking.bad_steps import BadSteps
from engine.tracking.performance import Meter
from engine.zero import partitions
from engine.zero.settings import replaced_scheduler, resolve_deepspeed, teacher_settings

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a run is given beside its configuration; None means the configuration names it."""

    model: nn.Module | None = None
    teacher_model: nn.Module | None = None
    tokenizer: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    teacher_tokenizer: Any = None


@dataclass
class Run:
    """The parts of a run, ready to train."""

    config: GKDConfig
    rank: int
    world_size: int
    device: torch.device
    tokenizer: Any
    student: Student
    parts: list[Any]  # what an export holds beside the student's weights
    teacher: Teacher
    objective: Objective
    rollout: Rollout
    data: StepData | None
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    resume_from: Resumption | None
    started: str
    bad_steps: BadSteps
    meter: Meter
    num_steps: int
    deepspeed_settings: dict[str, Any]


def assemble(config: GKDConfig, inputs: Inputs, train: bool = True) -> Run:
    """Check the input, then build every part. All ranks must call.

    Raises:
        ValueError: for input that cannot work; see engine/data/README.md, "Bad input".
    """
    device = init_distributed(config.timeout_s)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check.same_setup(config, writes=train)
    resolve_deepspeed(config, world_size)  # so that a contradiction in it is named first
    if config.teacher_placement == "zero3":
        teacher_settings(config)
    if rank == 0 and (sentence := replaced_scheduler(config)):
        logger.info(sentence)
    resume_from = find_resumption(config) if train else None
    if train:
        run_folder.check_start(config, resume_from.path if resume_from else None)
    if resume_from is not None and resume_from.global_batch_size is not None:
        config = config.with_global_batch(resume_from.global_batch_size)
    checkpoints = Checkpoints(config)
    settings = resolve_deepspeed(config, world_size)  # with the global batch of the checkpoint
    started = from_main((resume_from.started if resume_from else None) or date.today().isoformat())
    read = together(lambda: _read_inputs(config, inputs, train, rank, world_size, started))
    check.same_data(read.fingerprints)
    checkpoints.data = {
        use: {"split": split, "digest": read.fingerprints[split], "rows": num_rows}
        for use, (split, num_rows) in read.num_rows.items()
    }
    if resume_from is not None:
        check_inputs(resume_from, config, checkpoints.data, read.num_steps)

    groups = build_vocab_groups(config.vocab_parallel_size, hosts.ranks_per_node())
    student = build_student(config, inputs.model, groups, read.shared_vocab_size, read.num_steps)
    teacher = build_teacher(config, inputs.teacher_model, device)
    teacher.attach(student)
    objective = Objective(config, student.head, device)
    sampling = build_sampling(config, read.tokenizer, student.model, read.shared_vocab_size)
    parts = export_parts(student.model.config, student.model.generation_config, read.tokenizer, sampling.stop_ids)
    rollout = Rollout(config, sampling, rank, world_size, device)
    evaluator = None
    if read.evaluator_batches is not None:
        evaluator = Evaluator(read.evaluator_batches, objective, rollout, student, teacher)
    partitions.bound_waits(config.timeout_s)
    return Run(
        config, rank, world_size, device, read.tokenizer, student, parts, teacher, objective, rollout, read.data,
        evaluator, checkpoints, resume_from, started, BadSteps(config, read.tokenizer, rank, device),
        Meter(student.model, teacher.model), read.num_steps, settings,
    )  # fmt: skip


@dataclass
class _Read:
    """What a rank has read and checked before it builds anything."""

    shared_vocab_size: int
    tokenizer: Any
    data: StepData | None
    evaluator_batches: list[list[Sample]] | None
    num_steps: int
    fingerprints: dict[str, str]
    num_rows: dict[str, tuple[str, int | None]]  # `train` and `eval`: the split, and its usable rows; None of a stream


def _read_inputs(config: GKDConfig, inputs: Inputs, train: bool, rank: int, world_size: int, started: str) -> _Read:
    """Read configurations, tokenizers and rows and download what is missing, the first rank of a host before the rest.

    Raises:
        ValueError: for input that cannot work.
    """
    with hosts.host_by_host(config.prepare_timeout_s):
        return _read(config, inputs, train, rank, world_size, datetime.fromisoformat(started))


def _read(config: GKDConfig, inputs: Inputs, train: bool, rank: int, world_size: int, now: datetime) -> _Read:
    student_config, teacher_config = (
        _model_config(given, name, field, config)
        for given, name, field in (
            (inputs.model, config.model_name_or_path, "model_name_or_path"),
            (inputs.teacher_model, config.teacher_model_name_or_path, "teacher_model_name_or_path"),
        )
    )
    for who, model_config in (("student", student_config), ("teacher", teacher_config)):
        check_positions(model_config, config.max_length, who, rank == 0)
    shared_vocab_size = min(c.get_text_config().vocab_size for c in (student_config, teacher_config))
    tokenizer = _tokenizer(config, inputs, shared_vocab_size)
    data, evaluator_batches = None, None
    fingerprints: dict[str, str] = {}
    num_rows: dict[str, tuple[str, int | None]] = {}
    wants_evaluation = not train or config.eval_steps is not None or config.eval_on_start
    if wants_evaluation and inputs.train_dataset is not None and inputs.eval_dataset is None:
        raise ValueError("eval_steps or eval_on_start is set, and train_dataset= came without eval_dataset=: pass both")
    if train:
        _check_export(inputs.model, config, student_config, tokenizer)
        rows = build_rows(
            inputs.train_dataset, tokenizer, config, config.dataset_train_split, rank, now, shared_vocab_size
        )
        data = StepData(rows, config, world_size, rank)
        fingerprints[config.dataset_train_split] = rows.fingerprint
        num_rows["train"] = config.dataset_train_split, len(rows) if isinstance(rows, MapRows) else None
    split = config.dataset_test_split or "test"
    if inputs.eval_dataset is None and config.dataset_test_split is None:
        if wants_evaluation:
            raise ValueError("evaluation is asked for, and dataset_test_split is none: name the split to evaluate on")
    elif (
        inputs.eval_dataset is not None
        or wants_evaluation
        or (inputs.train_dataset is None and has_split(config, split))
    ):
        rows = build_rows(inputs.eval_dataset, tokenizer, config, split, rank, now, shared_vocab_size)
        assert isinstance(rows, MapRows)  # `build_rows` refuses a stream to evaluate on
        evaluator_batches = eval_batches(rows, rank, world_size, config.per_device_eval_batch_size)
        fingerprints[split] = rows.fingerprint
        num_rows["eval"] = split, len(rows)
    for given, name in (
        (inputs.model, config.model_name_or_path),
        (inputs.teacher_model, config.teacher_model_name_or_path),
    ):
        if given is None:
            assert name is not None  # `_model_config` has read it
            download_model(name)
    num_steps = count_steps(config, data) if data is not None else 1
    return _Read(shared_vocab_size, tokenizer, data, evaluator_batches, num_steps, fingerprints, num_rows)


def _model_config(model: nn.Module | None, name: str | None, field: str, config: GKDConfig) -> Any:
    """The model's configuration, after the check that its class can be used."""
    if model is None:
        if name is None:
            raise ValueError(f"{field} is not set, and no model object was given")
        model = build_on_meta(name, read_model_config(name, config), config)
    check_usable(model, longest_row(config))
    return model.config


def longest_row(config: GKDConfig) -> int:
    """Most tokens that a micro-batch packs into one row."""
    train = config.per_device_train_batch_size * config.num_generations * config.teacher_tp_size  # scored together
    return config.max_length * max(train, config.per_device_eval_batch_size)


def _check_export(model: nn.Module | None, config: GKDConfig, student_config: Any, tokenizer: Any) -> None:
    """What is saved beside the weights can be saved, which must not show at the first checkpoint."""
    if model is not None:
        settings = model.generation_config
    else:
        assert config.model_name_or_path is not None  # `_model_config` has read it
        settings = read_generation_config(config.model_name_or_path, student_config)
    check_saveable(export_parts(student_config, settings, tokenizer, stop_ids_of(config, tokenizer, settings)))


def _tokenizer(config: GKDConfig, inputs: Inputs, shared_vocab_size: int) -> Any:
    """The student's tokenizer, which the teacher must share."""
    if inputs.tokenizer is not None:
        tokenizer = prepare_tokenizer(plain_tokenizer(inputs.tokenizer))
    elif config.model_name_or_path is not None:
        tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    else:
        raise ValueError("a model object came without its tokenizer: pass processing_class=")
    check_ids(stop_token_ids(tokenizer), shared_vocab_size, tokenizer)  # more ids than rows are no fault of their own
    teacher_tokenizer = _teacher_tokenizer(config, inputs)
    if teacher_tokenizer is None:
        logger.warning(
            "the teacher came as an object without a tokenizer: that its ids mean what the student's do was not "
            "checked. Pass teacher_processing_class="
        )
    else:
        check_same_vocabulary(tokenizer, teacher_tokenizer, config.allow_token_renames)
    return tokenizer


def _teacher_tokenizer(config: GKDConfig, inputs: Inputs) -> Any:
    """The teacher's tokenizer; None for an object that nobody knows the tokenizer of."""
    if inputs.teacher_tokenizer is not None:
        return plain_tokenizer(inputs.teacher_tokenizer)
    if inputs.teacher_model is None:
        assert config.teacher_model_name_or_path is not None  # `_model_config` has read it
        return load_tokenizer(config.teacher_model_name_or_path, config.trust_remote_code)
    return load_tokenizer_at_hand(inputs.teacher_model.config.name_or_path, config.trust_remote_code)


def count_steps(config: GKDConfig, data: StepData) -> int:
    """Optimizer steps of the run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * data.steps_per_epoch)


def stop_ids_of(config: GKDConfig, tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids at which the student stops, in rollouts and once it is exported."""
    template = TemplateInput(kwargs=config.chat_template_kwargs)
    return stop_token_ids(tokenizer, generation_config.eos_token_id, template)


def build_sampling(config: GKDConfig, tokenizer: Any, model: nn.Module, shared_vocab_size: int) -> Sampling:
    context_size = min(
        config.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", config.max_length)
    )
    stop_ids = stop_ids_of(config, tokenizer, model.generation_config)
    check_ids(stop_ids, shared_vocab_size, tokenizer)
    return Sampling(
        stop_ids=tuple(stop_ids),
        vocab_size=min(shared_vocab_size, len(tokenizer)),
        context_size=context_size,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
    )

"""Assembly: from a configuration (and, in Python, model and dataset objects) to the parts of a run.

Everything that can be wrong with the input is checked before a model's weights are read (`inputs`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine import check
from engine.checkpoint import run_folder
from engine.checkpoint.changes import optimizer_name
from engine.checkpoint.checkpoint import Checkpoints
from engine.checkpoint.parts import export_parts
from engine.checkpoint.resumption import Resumption, check_inputs, find_resumption
from engine.cluster import hosts
from engine.cluster.agreement import from_main, together
from engine.cluster.collectives import build_vocab_groups
from engine.cluster.startup import init_distributed, set_numerics
from engine.config import GKDConfig
from engine.data.encoding import Format
from engine.data.samples import StepData
from engine.data.vocabulary import check_ids
from engine.evaluation import Evaluator
from engine.inputs import Inputs, Read, Reader, check_objects, stop_ids_of
from engine.loss.objective import Objective
from engine.models.schedule import check_schedule
from engine.models.student import Student, build_student
from engine.publish.hub import Hub
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
class Run:
    """The parts of a run, ready to train."""

    config: GKDConfig
    rank: int
    world_size: int
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    student: Student
    parts: list[Any]  # what an export holds beside the student's weights
    teacher: Teacher
    objective: Objective
    rollout: Rollout
    data: StepData | None
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    hub: Hub
    resume_from: Resumption | None
    problem: str | None  # with a start, where nobody says what is to be resumed
    started: str
    bad_steps: BadSteps
    meter: Meter
    num_steps: int
    shared_vocab_size: int
    deepspeed_settings: dict[str, Any]


def assemble(config: GKDConfig, inputs: Inputs, train: bool = True, resumes_later: bool = False) -> Run:
    """Check the input, then build every part. All ranks must call.

    Where the run folder holds a run, `resumes_later` prepares to go on from its newest checkpoint, and leaves a
    `problem` in case that is not what is asked for.

    Raises:
        ValueError: for input that cannot work; see engine/data/README.md, "Bad input".
    """
    set_numerics(config.use_cpu, config.tf32, config.full_determinism, config.seed)
    device = init_distributed(config.timeout_s)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check.same_setup(config, writes=train)
    check_objects(config, inputs)
    is_given = inputs.optimizer is not None
    resolve_deepspeed(config, world_size, is_given=is_given)  # so that a contradiction in it is named first
    check_schedule(config)
    if config.teacher_placement == "zero3":
        teacher_settings(config)
    if rank == 0 and (sentence := replaced_scheduler(config)):
        logger.info(sentence)
    if rank == 0 and config.accepted_sentence:
        logger.warning(config.accepted_sentence)
    optimizer_now = optimizer_name(config, inputs.optimizer)
    resume_from, problem = _find_start(config, optimizer_now, resumes_later) if train else (None, None)
    hub = Hub(config, rank == 0)
    if train and config.push_to_hub:
        hub.open()
    if resume_from is not None and resume_from.global_batch_size is not None:
        config = config.with_global_batch(resume_from.global_batch_size)
    checkpoints = Checkpoints(config)
    checkpoints.optimizer_name = optimizer_now
    settings = resolve_deepspeed(config, world_size, is_given=is_given)  # with the global batch of the checkpoint
    started = from_main((resume_from.started if resume_from else None) or date.today().isoformat())
    read = together(lambda: _read(Reader(config, inputs, train, rank, world_size, datetime.fromisoformat(started))))
    check.same_data(read.fingerprints)
    checkpoints.data = {
        use: {"split": split, "digest": read.fingerprints[split], "rows": num_rows}
        for use, (split, num_rows) in read.num_rows.items()
    }
    if resume_from is not None and problem is None:
        check_inputs(resume_from, config, checkpoints.data, read.num_steps)

    groups = build_vocab_groups(config.vocab_parallel_size, hosts.ranks_per_node())
    student = build_student(
        config, inputs.model, groups, read.shared_vocab_size, read.num_steps, inputs.optimizer, inputs.scheduler
    )
    teacher = build_teacher(config, inputs.teacher_model, device)
    teacher.attach(student)
    objective = Objective(config, student.head, device)
    sampling = build_sampling(config, read.tokenizer, student.model, read.shared_vocab_size)
    parts = export_parts(student.model.config, student.model.generation_config, read.tokenizer, sampling.stop_ids)
    rollout = Rollout(config, sampling, rank, world_size, device)
    evaluator = Evaluator(read.evaluation_sets, objective, rollout, student, teacher) if read.evaluation_sets else None
    partitions.bound_waits(config.timeout_s)
    return Run(
        config, rank, world_size, device, read.tokenizer, student, parts, teacher, objective, rollout, read.data,
        evaluator, checkpoints, hub, resume_from, problem, started, BadSteps(config, read.tokenizer, rank, device),
        Meter(student.model, teacher.model), read.num_steps, read.shared_vocab_size, settings,
    )  # fmt: skip


def _find_start(config: GKDConfig, optimizer_now: str, resumes_later: bool) -> tuple[Resumption | None, str | None]:
    """The checkpoint to go on from, and what is wrong with a start of which nobody says that it does."""
    if not resumes_later or config.resume_from_checkpoint is not None:
        resume_from = find_resumption(config, optimizer_now)
        run_folder.check_start(config, resume_from.path if resume_from else None)
        return resume_from, None
    problem = run_folder.find_problem(config, None)
    if problem is None:
        return None, None
    try:
        newest = find_resumption(config.with_resume("auto"), optimizer_now)
    except ValueError as error:
        raise ValueError(f"{problem}. To go on with it: {error}") from error
    if newest is None:
        raise ValueError(problem)
    return newest, problem


def resume(run: Run, wanted: str | Path | bool) -> None:
    """Have the run go on from a checkpoint: a path, or true for the newest. All ranks must call.

    Raises:
        ValueError: where there is none, or the run was built for steps of another size.
    """
    config = run.config.with_resume("auto" if wanted is True else str(wanted))
    found = find_resumption(config, run.checkpoints.optimizer_name)
    if found is None:
        raise ValueError(f"train(resume_from_checkpoint=True): {config.output_dir} holds no complete checkpoint")
    run_folder.check_start(config, found.path)
    if found.global_batch_size is not None:
        raise ValueError(
            f"{found.path} was trained with {found.global_batch_size} sequences a step, and this run has "
            f"{config.global_batch(run.world_size)}: resume_from_checkpoint of GKDConfig takes over the size"
        )
    check_inputs(found, config, run.checkpoints.data, run.num_steps)
    run.resume_from, run.problem = found, None


def build_evaluator(run: Run, dataset: Any, formatting_func: Format | None) -> Evaluator:
    """An evaluator on other rows: a dataset, or a dict of them by name. All ranks must call.

    Raises:
        ValueError: for rows that cannot be used.
    """
    inputs = Inputs(tokenizer=run.tokenizer, eval_dataset=dataset, formatting_func=formatting_func)
    reader = Reader(run.config, inputs, False, run.rank, run.world_size, datetime.fromisoformat(run.started))
    read = Read(run.shared_vocab_size, run.tokenizer)

    def read_rows() -> None:
        with hosts.host_by_host(run.config.prepare_timeout_s):
            reader.read_evaluation_sets(dataset, read)

    together(read_rows)
    check.same_data(read.fingerprints)
    return Evaluator(read.evaluation_sets, run.objective, run.rollout, run.student, run.teacher)


def _read(reader: Reader) -> Read:
    """The first rank of a host reads, and downloads what is missing, before the rest."""
    with hosts.host_by_host(reader.config.prepare_timeout_s):
        return reader.read()


def build_sampling(
    config: GKDConfig, tokenizer: PreTrainedTokenizerBase, model: nn.Module, shared_vocab_size: int
) -> Sampling:
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

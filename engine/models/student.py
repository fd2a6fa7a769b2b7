"""The student under ZeRO-3: engine, optimizer, schedule, head. The trainer sees hidden states and steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

from engine.cluster.collectives import VocabGroups
from engine.config import GKDConfig
from engine.config.source import student_source
from engine.data.batch import PackedBatch
from engine.loss.head import HeadShard, StudentHead
from engine.models.backbone import (
    HiddenStates,
    check_packing,
    compute_dtype,
    detach_device_map,
    hidden_states,
    load_causal_lm,
    switch_dropout_off,
)
from engine.models.optimizer import build_optimizer, check_given, parameter_groups
from engine.models.regularizers import EmbeddingNoise, RouterBalance
from engine.models.schedule import MetricSchedule, build_schedule, given_schedule
from engine.models.structure import describe_head, freeze_unused
from engine.zero import partitions
from engine.zero.settings import resolve_deepspeed

logger = logging.getLogger(__name__)


@dataclass
class Student:
    """A ZeRO-3 engine around the student, and its head as row blocks. All ranks must call every method."""

    model: nn.Module
    engine: deepspeed.DeepSpeedEngine
    head: StudentHead
    noise: EmbeddingNoise | None = None
    balance: RouterBalance | None = None

    def hidden(self, batch: PackedBatch, step: int | None = None) -> torch.Tensor:
        """Hidden states that predict the response tokens, [N, H]; those to train on at a step, where one is given."""
        with self.noise.over(batch, step) if self.noise is not None and step is not None else nullcontext():
            return hidden_states(self.engine, batch)

    def router_loss(self, num_batches: int) -> torch.Tensor | float:
        """This rank's part of the experts' balance in the last forward, where that is asked for: a mean over the ranks
        and their `num_batches` micro-batches."""
        return 0.0 if self.balance is None else self.balance.loss() / (num_batches * self.head.groups.world_size)

    def open_step(self, train: bool) -> HeadShard:
        """Switch the mode and collect this rank's head rows as the weights stand."""
        self.engine.train(train)
        return self.head.open_step(train)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Back-propagate one micro-batch. `loss` is this rank's part of the step's loss, a sum with the global
        normalisation already in its weights; ZeRO averages over ranks, hence the factor."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.head.groups.world_size, scale_wrt_gas=False)

    def step(self, is_finite: bool) -> bool:
        """Put the head's gradient into ZeRO's partition, clip, update the weights and the learning rate.

        Returns whether that was done: weights, optimizer and schedule stay as they are where the loss is not finite,
        as the caller says, or the gradient, as its norm tells. The same on every rank.
        """
        self.head.close_step()
        if not is_finite:
            partitions.void_gradients(self.engine)
        self.engine.step()
        return self.engine.was_step_applied()

    def note_metrics(self, metrics: Mapping[str, float]) -> None:
        """Tell the schedule what an evaluation found, where it goes by that. ValueError where it lacks the metric."""
        if isinstance(self.engine.lr_scheduler, MetricSchedule):
            self.engine.lr_scheduler.observe(metrics)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    @property
    def learning_rate(self) -> float:
        return self.engine.get_lr()[0]

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The whole model on every rank, in evaluation mode, to generate with."""
        self.engine.eval()
        with partitions.gathered_for_generation(self.engine):
            yield self.model


def build_student(
    config: GKDConfig,
    model: nn.Module | None,
    groups: VocabGroups,
    shared_vocab_size: int,
    num_steps: int,
    given_optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
) -> Student:
    """Partition the student (a model object, or `model_name_or_path` while it loads) and attach its optimizer.

    An optimizer of the caller's is one of the model object's weights; a schedule of theirs is as `given_schedule`
    takes it. All ranks must call.

    Raises:
        ValueError: where one of these cannot be used.
    """
    is_given = given_optimizer is not None
    settings = resolve_deepspeed(config, groups.world_size, is_given=is_given)
    if model is None:
        model = load_causal_lm(student_source(config), compute_dtype(config), settings)
    settings = resolve_deepspeed(
        config, groups.world_size, model.config.get_text_config().hidden_size, is_given=is_given
    )
    detach_device_map(model)
    model.to(compute_dtype(config))
    head = describe_head(model)
    prepare_gradients(model)
    model.config.architectures = [type(model).__name__]  # what the export is loaded with
    if config.disable_dropout:
        switch_dropout_off(model)
    partitions.moe_leaf_modules(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if given_optimizer is not None:
        check_given(given_optimizer, model)
    optimizer = None if "optimizer" in settings else given_optimizer or build_optimizer(model, config)

    def make_schedule(basic_optimizer: torch.optim.Optimizer) -> Any:
        if schedule is not None:
            return given_schedule(schedule, basic_optimizer, config)
        return build_schedule(basic_optimizer, config, num_steps)

    noise, balance, module = None, None, HiddenStates(model)
    if config.neftune_noise_alpha:
        noise = EmbeddingNoise(model.get_input_embeddings(), config.neftune_noise_alpha, config.seed)
    if config.router_aux_loss_coef:
        module.balance = balance = RouterBalance(model, config.router_aux_loss_coef)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=parameter_groups(model, config.weight_decay) if optimizer is None else None,
        lr_scheduler=make_schedule,
        config=settings,
    )
    student = Student(model, engine, StudentHead(head, groups, shared_vocab_size, engine.device), noise, balance)
    engine.eval()
    check_packing(model, student.hidden, engine.device)
    return student


def prepare_gradients(model: nn.Module) -> None:
    """Leave out of training what no text passes through. What the user has frozen stays so.

    Raises:
        ValueError: where nothing is left to train, or a head's bias is to be trained without its weight.
    """
    num_unused, head = freeze_unused(model), model.get_output_embeddings()
    if num_unused:
        logger.info("%s: %d parameters outside its text model are not trained", type(model).__name__, num_unused)
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("every parameter of the student is frozen (requires_grad=False): nothing could be trained")
    if head.bias is not None and head.bias.requires_grad and not head.weight.requires_grad:
        raise ValueError("the student's head is frozen and its bias is not: freeze both, or neither")

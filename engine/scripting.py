"""What a script does with a trainer beside training: models, metrics and states as files, the hub, generation.

Names, arguments and files are those of transformers' `Trainer`, which scripts are written for.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_pt_utils import log_metrics, save_metrics

from engine.accelerator import Accelerator, GatheredStudent
from engine.assembly import Run
from engine.callbacks import Callbacks
from engine.config import GKDConfig
from engine.publication import Publication
from engine.publish.card import is_of_a_user


class Scripting:
    """Methods of `GKDTrainer`, which has the attributes."""

    run: Run
    config: GKDConfig
    callbacks: Callbacks
    publication: Publication

    # On rank 0: print figures, write them to `<split>_results.json` and `all_results.json` of the run folder.
    log_metrics = log_metrics
    save_metrics = save_metrics

    @property
    def args(self) -> GKDConfig:
        return self.config

    @property
    def model(self) -> nn.Module:
        """The student, its parameters partitioned over the ranks."""
        return self.run.student.model

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher, in its placement."""
        return self.run.teacher.model

    @property
    def state(self) -> TrainerState:
        return self.callbacks.state

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's, around the student's partitions."""
        return self.run.student.engine.optimizer

    @property
    def lr_scheduler(self) -> Any:
        return self.run.student.engine.lr_scheduler

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.run.tokenizer

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        return self.run.tokenizer

    @property
    def generation_config(self) -> GenerationConfig:
        """How rollouts sample, in transformers' words."""
        sampling, stop_ids = self.run.rollout.sampling, list(self.run.rollout.sampling.stop_ids)
        return GenerationConfig(
            do_sample=True,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty,
            pad_token_id=self.run.tokenizer.pad_token_id,
            eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids,
        )

    @cached_property
    def accelerator(self) -> Accelerator:
        """Ranks, and the student to generate with; not accelerate's."""
        return Accelerator(self.run.student)

    @property
    def model_wrapped(self) -> GatheredStudent:
        """The student to generate with, inside `accelerator.split_between_processes`."""
        return self.accelerator.whole

    def is_world_process_zero(self) -> bool:
        return self.accelerator.is_main_process

    def is_local_process_zero(self) -> bool:
        return self.accelerator.is_local_main_process

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the student as a Hugging Face folder, with tokenizer and model card; what else lies there stays.

        By default into the run folder. With `push_to_hub`, it is pushed as well. All ranks must call.

        Raises:
            CheckpointError: where it cannot be written.
        """
        self.publication.save(Path(output_dir or self.config.output_dir))
        if self.config.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def save_state(self) -> None:
        """Write `trainer_state.json` into the run folder, on rank 0."""
        if self.is_world_process_zero():
            self.callbacks.exported_state().save_to_json(str(Path(self.config.output_dir) / "trainer_state.json"))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, `README.md` of the run folder, on rank 0. A name that is a path is not named."""
        if self.is_world_process_zero():
            self.publication.card(model_name, dataset_name, tags).save_pretrained(Path(self.config.output_dir))

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Future[Any] | Any | None:
        """Save the student into the run folder and push it, with what lies beside it there and is not about the run.

        Other arguments are those of `create_model_card`. Returns huggingface_hub's `CommitInfo`, or its future where
        `blocking` is false; None on other ranks than 0, and where it failed, which is a warning. All ranks must call.

        Raises:
            ValueError: where the hub refuses token or name.
        """
        self.callbacks.tell("on_push_begin")
        self.run.hub.open(token, private)
        self.save_model(_internal_call=True)
        if card or not is_of_a_user(Path(self.config.output_dir) / "README.md"):
            self.create_model_card(**card)
        return self.publication.push(Path(self.config.output_dir), commit_message, blocking, token, revision)

"""Steps of the loss on real ZeRO-3 partitions: tiny student and teacher, ragged samples, forward and backward."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.cluster.collectives import build_vocab_groups, gather_counts
from engine.config import GKDConfig
from engine.data.batch import Sample, pack
from engine.loss.divergence import DivergenceSpec
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence
from engine.models.student import build_student
from engine.teacher.placements import build_teacher
from tests.library.families import CONFIGS
from tests.library.models import build, tiny_llama


@dataclass(frozen=True)
class Case:
    group_size: int
    vocab_size: int = 1001
    teacher_vocab_size: int = 1001
    tied: bool = False
    accumulation: int = 1
    offload: bool = False
    chunk_bytes: int = 40_000  # several chunks per micro-batch
    compiled: bool = False
    family: str | None = None  # of the student, in place of a Llama


def ragged_samples(rank: int, micro: int, vocab_size: int) -> list[Sample]:
    """Ragged: rank 1 has no response token in its first micro-batch, others have 4 to 14."""
    generator = torch.Generator().manual_seed(1000 * rank + micro)
    lengths = torch.randint(6, 12, (2,), generator=generator).tolist()
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        mask = [False] * 3 + [not (rank == 1 and micro == 0)] * (length - 3)
        rows.append(Sample(ids[:3], ids, mask, index))
    return rows


def build_case(case: Case, learning_rate: float = 0.0, hidden_size: int = 16):
    student = tiny_llama(case.vocab_size, case.tied, hidden_size, seed=1)
    if case.family is not None:
        student = build(CONFIGS[case.family], seed=1)
        if student.lm_head.bias is not None:
            with torch.no_grad():
                student.lm_head.bias.copy_(torch.linspace(-1.0, 1.0, case.vocab_size))
    teacher = tiny_llama(case.teacher_vocab_size, False, hidden_size=24, seed=2)
    settings = GKDConfig(bf16=False).to_dict()["deepspeed"]
    if case.offload:
        settings = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    config = GKDConfig(
        bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=case.accumulation, deepspeed=settings,
        learning_rate=learning_rate, gradient_checkpointing=False, max_grad_norm=0.5, teacher_placement="replicated",
        lr_scheduler_type="constant", weight_decay=0.1,
    )  # fmt: skip
    groups = build_vocab_groups(case.group_size, dist.get_world_size())
    shared = min(case.vocab_size, case.teacher_vocab_size)
    reference = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    built = build_student(config, student, groups, shared, num_steps=10)
    teacher = build_teacher(config, teacher, torch.device("cpu"))
    teacher.attach(built)
    return built, teacher, Stream(groups, built.head.ids_S, case.chunk_bytes, case.compiled, shared), reference


def train_step(case: Case, parts, spec: DivergenceSpec) -> float:
    """Forward and backward of one optimizer step, up to the head's gradient; returns the global loss."""
    student, teacher, stream, _ = parts
    rank, shared = dist.get_rank(), min(case.vocab_size, case.teacher_vocab_size)
    batches = [pack(ragged_samples(rank, m, shared), "cpu") for m in range(case.accumulation)]
    counts = gather_counts([b.num_response_tokens for b in batches], "cpu")
    total = torch.zeros(1)
    shard = student.open_step(train=True)
    for index, (batch, signal) in enumerate(zip(batches, teacher.signals(batches), strict=True)):
        weights = torch.full((batch.num_response_tokens,), 1 / counts.sum().item())
        longest = int(counts[list(stream.groups.group_ranks), index].max())
        loss, _ = vocab_parallel_divergence(
            student.hidden(batch), signal, shard, batch.target_ids_N, weights, longest, spec, stream
        )
        student.backward(loss, is_last=index + 1 == len(batches))
        total += loss.detach()
    student.head.close_step()
    dist.all_reduce(total)
    return total.item()

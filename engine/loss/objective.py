"""The loss of a run: weights of the tokens, the teacher's resident rows, and the sums that become metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.cluster.collectives import VocabGroups, gather_counts
from engine.config import GKDConfig
from engine.data.batch import PackedBatch
from engine.loss.divergence import DivergenceSpec
from engine.loss.head import HeadShard, HeadSpec, StudentHead, build_teacher_head
from engine.loss.vocab_parallel import COLUMNS, Stream, vocab_parallel_divergence

POSITION_BUCKETS = (0, 16, 64, 256)  # first response positions of the buckets that metrics are split by
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20, "accelerator": 256 * 2**20}


@dataclass(frozen=True)
class TokenCounts:
    """Response tokens of a step, counted after generation.

    Attributes:
        per_batch: int64 [ranks, micro-batches] on the host.
        num_sequences: sequences with a response, over all ranks.
    """

    per_batch: torch.Tensor
    num_sequences: int

    @property
    def total(self) -> int:
        return int(self.per_batch.sum())


def count_response_tokens(batches: list[PackedBatch], device: torch.device) -> TokenCounts:
    """Count over all ranks: one collective and one read for the whole step. All ranks must call."""
    sequences = sum(batch.sequence_N.unique().numel() for batch in batches)
    counts = gather_counts([*(batch.num_response_tokens for batch in batches), sequences], device)
    return TokenCounts(counts[:, :-1], int(counts[:, -1].sum()))


class Objective:
    """Divergence between student and teacher on packed batches. All ranks must call its methods."""

    def __init__(
        self,
        config: GKDConfig,
        student_head: StudentHead,
        teacher_head: HeadSpec,
        shared_vocab_size: int,
        device: torch.device,
    ):
        self.config, self.groups, self.device = config, student_head.groups, device
        self.teacher_shard: HeadShard = build_teacher_head(teacher_head, student_head.ids_S, shared_vocab_size)
        self.stream = build_stream(config, self.groups, student_head.ids_S.to(device))

    def spec(self, with_references: bool) -> DivergenceSpec:
        """The divergence; `sft_weight` counts only where the response is not the student's own."""
        c = self.config
        sft_weight = c.sft_weight if with_references else 0.0
        return DivergenceSpec(c.divergence, c.beta, c.skew_alpha, c.temperature, c.token_clip, sft_weight)

    def __call__(
        self, student_NH: torch.Tensor, teacher_NH: torch.Tensor, student_shard: HeadShard, batch: PackedBatch,
        counts: TokenCounts, micro: int, spec: DivergenceSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """This rank's part of the step's loss, and the per-token values [N, 6] of `COLUMNS`."""
        longest = int(counts.per_batch[list(self.groups.group_ranks), micro].max())
        weight_N = self.token_weights(batch, counts)
        return vocab_parallel_divergence(
            student_NH,
            teacher_NH,
            student_shard,
            self.teacher_shard,
            batch.target_ids_N,
            weight_N,
            longest,
            spec,
            self.stream,
        )

    def token_weights(self, batch: PackedBatch, counts: TokenCounts) -> torch.Tensor:
        """Weight of each token's loss, fp32 [N]; over all ranks and micro-batches they sum to 1."""
        if self.config.loss_normalization == "token":
            return torch.full((batch.num_response_tokens,), 1 / max(1, counts.total), device=self.device)
        lengths_B = torch.bincount(batch.sequence_N, minlength=batch.num_sequences)
        return 1 / (lengths_B[batch.sequence_N].float() * max(1, counts.num_sequences))


def build_stream(config: GKDConfig, groups: VocabGroups, ids_S: torch.Tensor) -> Stream:
    on_cpu = ids_S.device.type == "cpu"
    chunk_bytes = config.loss_chunk_bytes or DEFAULT_CHUNK_BYTES["cpu" if on_cpu else "accelerator"]
    compiled = config.compile_loss == "on" or (config.compile_loss == "auto" and not on_cpu)
    return Stream(groups, ids_S, chunk_bytes, compiled)


class ValueSums:
    """Running sums of per-token values on the device; one reduction turns them into means over all tokens."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(COLUMNS) + 1, dtype=torch.float64, device=device)
        self._buckets = torch.zeros(2, len(POSITION_BUCKETS), dtype=torch.float64, device=device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, values_N6: torch.Tensor, loss: torch.Tensor | None = None) -> None:
        values = values_N6.double()
        self._sums[:-1] += values.sum(0)
        self._sums[-1] += values.shape[0]
        edges = torch.tensor(POSITION_BUCKETS[1:], device=values.device)
        bucket_N = torch.bucketize(batch.offset_N, edges, right=True)
        self._buckets[0].index_add_(0, bucket_N, values[:, 0])
        self._buckets[1].index_add_(0, bucket_N, torch.ones_like(values[:, 0]))
        if loss is not None:
            self._loss += loss.detach()

    def reduce(self) -> tuple[dict[str, float], float, float]:
        """Means by name, the loss, and the number of tokens, over all ranks. All ranks must call."""
        packed = torch.cat([self._sums, self._buckets.flatten(), self._loss])
        dist.all_reduce(packed)
        *sums, count = packed[: len(COLUMNS) + 1].tolist()
        rest = packed[len(COLUMNS) + 1 :].tolist()
        means = {name: total / max(1.0, count) for name, total in zip(COLUMNS, sums, strict=True)}
        for index, first in enumerate(POSITION_BUCKETS):
            in_bucket = rest[len(POSITION_BUCKETS) + index]
            if in_bucket:
                means[f"divergence_from_{first}"] = rest[index] / in_bucket
        return means, rest[-1], count

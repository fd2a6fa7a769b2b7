"""The loss of a run and of one step: weights of the tokens, and the sums that become metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.cluster.collectives import VocabGroups, gather_counts
from engine.config import GKDConfig
from engine.data.batch import PackedBatch
from engine.loss.divergence import DivergenceSpec
from engine.loss.head import StudentHead
from engine.loss.signal import Signal
from engine.loss.values import TokenValues
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence

POSITION_BUCKETS = (0, 16, 64, 256)  # first response positions of the buckets that metrics are split by
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20, "accelerator": 256 * 2**20}


@dataclass(frozen=True)
class TokenCounts:
    """Response tokens of a step, counted after generation.

    Attributes:
        per_batch: int64 [ranks, micro-batches] on the host.
        num_sequences: sequences with a response, over all ranks.
        num_references: response tokens that the dataset's own answers have, over all ranks.
    """

    per_batch: torch.Tensor
    num_sequences: int
    num_references: int

    @property
    def total(self) -> int:
        return int(self.per_batch.sum())


def count_response_tokens(batches: list[PackedBatch], device: torch.device) -> TokenCounts:
    """Count over all ranks: one collective and one read for the whole step. All ranks must call."""
    sequences = sum(batch.sequence_N.unique().numel() for batch in batches)
    references = sum(batch.num_references for batch in batches)
    counts = gather_counts([*(batch.num_response_tokens for batch in batches), sequences, references], device)
    return TokenCounts(counts[:, :-2], int(counts[:, -2].sum()), int(counts[:, -1].sum()))


class Objective:
    """Divergence between student and teacher on packed batches, one optimizer step or pass of evaluation at a time."""

    def __init__(self, config: GKDConfig, student_head: StudentHead, device: torch.device) -> None:
        self.config, self.student_head, self.device = config, student_head, device
        self.stream = build_stream(
            config, student_head.groups, student_head.ids_S.to(device), student_head.shared_vocab_size
        )

    def begin(self, batches: list[PackedBatch], with_references: bool) -> LossStep:
        """The loss of these micro-batches, whose response tokens are counted here. All ranks must call.

        `sft_weight` counts only `with_references`: where the responses are not the student's own.
        """
        c = self.config
        sft_weight = c.sft_weight if with_references else 0.0
        smoothing = c.label_smoothing_factor if sft_weight else 0.0
        spec = DivergenceSpec(c.divergence, c.beta, c.skew_alpha, c.temperature, c.token_clip, sft_weight, smoothing)
        return LossStep(self, spec, batches, count_response_tokens(batches, self.device))


class Totals(NamedTuple):
    """A step over all ranks: means over its tokens by name, its loss, its response tokens."""

    means: dict[str, float]
    loss: float
    num_tokens: float


class LossStep:
    """The loss of one step, micro-batch by micro-batch, between the student head's `open_step` and `close_step`.

    Attributes:
        values: the values of the tokens of each micro-batch so far.
    """

    def __init__(
        self, objective: Objective, spec: DivergenceSpec, batches: list[PackedBatch], counts: TokenCounts
    ) -> None:
        self.objective, self.spec, self.batches, self.counts = objective, spec, batches, counts
        self.values: list[TokenValues] = []
        self._sums = ValueSums(objective.device)

    def __call__(
        self, student_NH: torch.Tensor, signal: Signal, micro: int, extra: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """This rank's part of the step's loss, from micro-batch `micro`. All ranks of the token group must call.

        `extra` is a part of it that is none of the tokens'.
        """
        batch, head, stream = self.batches[micro], self.objective.student_head, self.objective.stream
        assert head.shard is not None  # `open_step` has collected it
        longest = int(self.counts.per_batch[list(head.groups.group_ranks), micro].max())
        weight_N = self.token_weights(batch)
        loss, values = vocab_parallel_divergence(
            student_NH, signal, head.shard, batch.target_ids_N, weight_N, longest, self.spec, stream
        )
        loss = loss + extra
        self._sums.add(batch, values, loss)
        self.values.append(values)
        return loss

    def token_weights(self, batch: PackedBatch) -> torch.Tensor:
        """Weight of each token's loss, fp32 [N]; over all ranks and micro-batches they sum to 1, but under `trl`.

        TRL 1.16 divides by the labels of the dataset, also where a rollout has taken their place, and its gradients are
        averaged over the ranks once more.
        """
        kind, num_ranks = self.objective.config.loss_normalization, self.objective.student_head.groups.world_size
        if kind != "sequence":
            divisor = self.counts.total if kind == "token" else num_ranks * self.counts.num_references
            return torch.full((batch.num_response_tokens,), 1 / max(1, divisor), device=self.objective.device)
        lengths_B = torch.bincount(batch.sequence_N, minlength=batch.num_sequences)
        return 1 / (lengths_B[batch.sequence_N].float() * max(1, self.counts.num_sequences))

    def reduce(self) -> Totals:
        """Over all ranks and the micro-batches so far. All ranks must call."""
        totals = self._sums.reduce()
        if not self.spec.label_smoothing:
            del totals.means["uniform_nll"]  # which nothing has computed
        return totals


def build_stream(config: GKDConfig, groups: VocabGroups, ids_S: torch.Tensor, num_ids: int) -> Stream:
    on_cpu = ids_S.device.type == "cpu"
    chunk_bytes = config.loss_chunk_bytes or DEFAULT_CHUNK_BYTES["cpu" if on_cpu else "accelerator"]
    compiled = config.compile_loss == "on" or (config.compile_loss == "auto" and not on_cpu)
    return Stream(groups, ids_S, chunk_bytes, compiled, num_ids)


class ValueSums:
    """Running sums of per-token values on the device; one reduction turns them into means over all tokens."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(TokenValues._fields), dtype=torch.float64, device=device)
        self._count, self._loss = (torch.zeros(1, dtype=torch.float64, device=device) for _ in range(2))
        self._in_bucket, self._bucket_counts = (
            torch.zeros(len(POSITION_BUCKETS), dtype=torch.float64, device=device) for _ in range(2)
        )

    def add(self, batch: PackedBatch, values: TokenValues, loss: torch.Tensor) -> None:
        divergence = values.divergence.double()
        self._sums += torch.stack(values).double().sum(1)
        self._count += divergence.numel()
        self._loss += loss.detach()
        edges = torch.tensor(POSITION_BUCKETS[1:], device=divergence.device)
        bucket_N = torch.bucketize(batch.offset_N, edges, right=True)
        self._in_bucket.index_add_(0, bucket_N, divergence)
        self._bucket_counts.index_add_(0, bucket_N, torch.ones_like(divergence))

    def reduce(self) -> Totals:
        """Over all ranks. All ranks must call."""
        parts = (self._sums, self._in_bucket, self._bucket_counts, self._count, self._loss)
        packed = torch.cat(parts)
        dist.all_reduce(packed)
        sums, in_bucket, bucket_counts, (count,), (loss,) = (
            part.tolist() for part in packed.split([part.numel() for part in parts])
        )
        means = {name: total / max(1.0, count) for name, total in zip(TokenValues._fields, sums, strict=True)}
        for first, total, num_tokens in zip(POSITION_BUCKETS, in_bucket, bucket_counts, strict=True):
            if num_tokens:
                means[f"divergence_from_{first}"] = total / num_tokens
        return Totals(means, loss, count)

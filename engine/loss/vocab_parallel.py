"""The vocabulary-parallel streamed divergence: hidden states in, loss out, no `[tokens, V]` anywhere.

Each rank of a token group holds S of the vocabulary's rows. The tokens of all G ranks pass by in chunks: their
hidden states are gathered, the rank computes `[chunk, S]` logits of both models, two small reductions give every
token's softmax statistics and sums, and the gradient follows at once, in the forward pass: the head's into the
shard's fp32 accumulator, the hidden states' back to the ranks that own the tokens. Backward only scales.

Collectives (token group, in this order on every rank): one gather of weights and targets per call; per chunk the
gather of hidden states and what the teacher's signal needs (both issued one chunk ahead), statistics, sums, and the
return of the hidden gradients (collected one chunk later).

Shapes: N tokens of this rank, C tokens of a chunk on one rank, M = G * C tokens of a chunk, K values of a token, S rows
of the shard, H the student's hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.cluster.collectives import VocabGroups, all_gather_rows, start_exchange, start_gather_span
from engine.loss import kernels
from engine.loss.divergence import DivergenceSpec
from engine.loss.head import HeadShard
from engine.loss.projection import accumulate_outer, matmul_fp32, project, softcap_slope
from engine.loss.signal import Signal
from engine.loss.values import TokenSums, TokenValues

ELEMENTWISE_BLOCK_BYTES = 2**17  # eager: tokens worked on at once, so that the temporaries stay in a core's cache
ELEMENTWISE_BUFFERS = 8  # temporaries of that size that are alive together


@dataclass(frozen=True)
class Stream:
    """What a stream keeps from call to call.

    Attributes:
        groups: the layout of ranks.
        ids_S: vocabulary id of each row of the shard, on the device; -1 marks padding.
        chunk_bytes: memory for the logits of one chunk; more makes larger GEMMs and fewer collectives.
        compiled: fuse the element-wise part with torch.compile.
        num_ids: size of the vocabulary that student and teacher share.
    """

    groups: VocabGroups
    ids_S: torch.Tensor
    chunk_bytes: int
    compiled: bool = False
    num_ids: int = 1

    @functools.cached_property
    def column_of_id(self) -> torch.Tensor:
        """Column of every vocabulary id in this shard, int64; -1 where another shard has it."""
        columns = torch.full((int(self.ids_S.max()) + 1,), -1, dtype=torch.long, device=self.ids_S.device)
        live = torch.nonzero(self.ids_S >= 0)[:, 0]
        columns[self.ids_S[live]] = live
        return columns

    def local_columns(self, ids: torch.Tensor) -> torch.Tensor:
        """Column of each id in this shard, -1 where it has none."""
        known = ids < self.column_of_id.numel()
        return torch.where(known, self.column_of_id[ids.clamp(max=self.column_of_id.numel() - 1)], -1)

    def chunk_tokens(self, student_hidden: int, signal: Signal, has_softcap: bool) -> int:
        """Tokens per rank and chunk: two fp32 [S] buffers each (three under a soft cap), the hidden states and the
        signal in flight; the element-wise temporaries come first."""
        width = self.ids_S.numel()
        per_token = (12 if has_softcap else 8) * width + 4 * (4 * student_hidden + signal.floats_in_flight)
        room = self.chunk_bytes - ELEMENTWISE_BUFFERS * max(ELEMENTWISE_BLOCK_BYTES, 4 * width)
        return max(1, room // (per_token * self.groups.group_size))


def vocab_parallel_divergence(
    student_hidden_NH: torch.Tensor,
    signal: Signal,
    student: HeadShard,
    target_ids_N: torch.Tensor,
    weight_N: torch.Tensor,
    num_tokens_max: int,
    spec: DivergenceSpec,
    stream: Stream,
) -> tuple[torch.Tensor, TokenValues]:
    """Weighted sum of this rank's per-token losses. All ranks of the token group must call.

    Differentiable in `student_hidden_NH`; the head's gradient goes into `student.grad_SH` during this call,
    already weighted, so the returned loss must be back-propagated with gradient 1 (times what ZeRO's averaging
    over ranks needs, which concerns the hidden states alone).

    Args:
        student_hidden_NH: hidden states that predict the response tokens; N may be 0.
        signal: what the teacher says about the same tokens.
        target_ids_N: the response tokens, for the likelihood; int64.
        weight_N: fp32 weight of each token's loss, e.g. 1 / (response tokens of the whole step).
        num_tokens_max: largest N among the ranks of the token group.

    Returns:
        The loss, a scalar, and the detached values of each token.
    """
    want_grad = torch.is_grad_enabled() and student_hidden_NH.requires_grad
    sweep = _Sweep(student, signal, spec, stream, want_grad)
    loss, values_KN = _StreamedDivergence.apply(student_hidden_NH, sweep, target_ids_N, weight_N, num_tokens_max)
    return loss, TokenValues(*values_KN)


class _StreamedDivergence(torch.autograd.Function):
    """Differentiable in the hidden states alone; autograd wants the values in one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: torch.Tensor,
        sweep: _Sweep,
        target_ids_N: torch.Tensor,
        weight_N: torch.Tensor,
        num_tokens_max: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_grad_NH, values_KN = sweep.run(student_hidden_NH, target_ids_N, weight_N, num_tokens_max)
        values, spec = TokenValues(*values_KN), sweep.spec
        divergence_N = values.divergence if spec.token_clip is None else values.divergence.clamp(max=spec.token_clip)
        nll_N = values.nll if not spec.label_smoothing else values.nll.lerp(values.uniform_nll, spec.label_smoothing)
        loss = (weight_N * (divergence_N + spec.sft_weight * nll_N)).sum()
        ctx.save_for_backward(hidden_grad_NH)
        ctx.mark_non_differentiable(values_KN)
        return loss, values_KN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (hidden_grad_NH,) = ctx.saved_tensors
        return ((hidden_grad_NH.float() * grad_loss).to(hidden_grad_NH.dtype), *[None] * 4)


class _Sweep:
    """One pass over the tokens of a token group."""

    def __init__(self, student: HeadShard, signal: Signal, spec: DivergenceSpec, stream: Stream, want_grad: bool):
        self.student, self.signal, self.spec, self.stream, self.want_grad = student, signal, spec, stream, want_grad
        self.group, self.group_size = stream.groups.tokens, stream.groups.group_size
        self.live_S: torch.Tensor | None = None
        if spec.label_smoothing:
            self.live_S = torch.ones(stream.ids_S.numel(), device=stream.ids_S.device)
            self.live_S[student.masked_columns] = 0.0

    def run(
        self, student_hidden_NH: torch.Tensor, target_ids_N: torch.Tensor, weight_N: torch.Tensor, num_tokens_max: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states' gradient (zeros where none is wanted), and `TokenValues` stacked, fp32 [K, N]."""
        num_tokens, width = student_hidden_NH.shape
        chunk = self.stream.chunk_tokens(width, self.signal, self.student.softcap is not None)
        spans = [(start, min(start + chunk, num_tokens_max)) for start in range(0, num_tokens_max, chunk)]
        weights, targets = self._gather_scalars(weight_N, target_ids_N, num_tokens_max)
        hidden_grad_NH = torch.zeros_like(student_hidden_NH)
        values_KN = student_hidden_NH.new_zeros(len(TokenValues._fields), num_tokens, dtype=torch.float32)
        coming = self._fetch(student_hidden_NH, *spans[0]) if spans else None
        returning: Callable[[], None] | None = None
        for index, (start, stop) in enumerate(spans):
            assert coming is not None
            student_MH, take_logits = coming[0](), coming[1]
            coming = self._fetch(student_hidden_NH, *spans[index + 1]) if index + 1 < len(spans) else None
            values_M, partial_grad_MH = self._chunk(
                student_MH, take_logits, weights[:, start:stop].flatten(), targets[:, start:stop].flatten()
            )
            own = slice(start, min(stop, num_tokens))
            place = self.stream.groups.rank % self.group_size
            own_part = torch.stack(values_M).view(-1, self.group_size, stop - start)[:, place]
            values_KN[:, own] = own_part[:, : max(0, num_tokens - start)]
            if returning is not None:
                returning()
            returning = None if partial_grad_MH is None else self._return(partial_grad_MH, hidden_grad_NH, own)
        if returning is not None:
            returning()
        return hidden_grad_NH, values_KN

    def _gather_scalars(
        self, weight_N: torch.Tensor, target_ids_N: torch.Tensor, num_tokens_max: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every rank's weights and targets, [G, num_tokens_max] each; weight 0 marks padding.

        They travel together as fp64, which holds any id exactly.
        """
        local = weight_N.new_zeros(1, 2, num_tokens_max, dtype=torch.float64)
        local[0, 0, : weight_N.numel()] = weight_N
        local[0, 1, : weight_N.numel()] = target_ids_N
        gathered = all_gather_rows(local, self.group)
        return gathered[:, 0].float(), gathered[:, 1].long()

    def _fetch(
        self, student_hidden_NH: torch.Tensor, start: int, stop: int
    ) -> tuple[Callable[[], torch.Tensor], Callable[[float], torch.Tensor]]:
        """Start gathering a chunk; the functions wait for the student's hidden states and for the teacher's logits."""
        student = start_gather_span(student_hidden_NH, start, stop, self.group)
        return student, self.signal.start(start, stop, self.stream.groups)

    def _return(self, partial_grad_MH: torch.Tensor, hidden_grad_NH: torch.Tensor, own: slice) -> Callable[[], None]:
        """Start handing each rank the gradients of its tokens; the returned function waits and adds them up."""
        sent = partial_grad_MH.to(hidden_grad_NH.dtype)
        if self.group_size == 1:
            hidden_grad_NH[own] = sent
            return lambda: None
        take = start_exchange(sent, self.group)

        def finish() -> None:
            received = take()
            total = received.view(self.group_size, -1, received.shape[1]).float().sum(0)
            hidden_grad_NH[own] = total[: max(0, own.stop - own.start)].to(hidden_grad_NH.dtype)

        return finish

    def _chunk(
        self,
        student_MH: torch.Tensor,
        take_teacher_logits: Callable[[float], torch.Tensor],
        weight_M: torch.Tensor,
        target_ids_M: torch.Tensor,
    ) -> tuple[TokenValues, torch.Tensor | None]:
        """Values and the shard's part of the hidden gradient, fp32 [M, H], of one chunk.

        Two [M, S] buffers serve throughout: the logits, then q and u in their place, then the gradient in q's.
        """
        spec, fused = self.spec, _kernels(self.stream.compiled)
        student_MS = project(student_MH, self.student, spec.temperature)
        teacher_MS = take_teacher_logits(spec.temperature)
        slope_MS = softcap_slope(student_MS, self.student, spec.temperature) if self.want_grad else None
        target_M = self.stream.local_columns(target_ids_M)
        blocks = self._token_blocks(student_MS)

        local_5M = torch.cat([fused.statistics(student_MS[b], teacher_MS[b], spec.temperature) for b in blocks], dim=1)
        shards = all_gather_rows(local_5M[None], self.group)
        norms_4M, log_sum_raw_M = kernels.merge_statistics(shards, spec.temperature)

        parts = []
        for b in blocks:
            part, q, u = fused.sums(student_MS[b], teacher_MS[b], norms_4M[:, b], target_M[b], self.live_S, spec)
            parts.append(part)
            student_MS[b], teacher_MS[b] = q, u
        sums = TokenSums(*self._sum_over_shards(torch.cat(parts, dim=1)))
        values = TokenValues.from_sums(sums, log_sum_raw_M, spec.temperature, self.stream.num_ids)
        if not self.want_grad:
            return values, None

        divergence_weight_M = weight_M
        if spec.token_clip is not None:
            divergence_weight_M = torch.where(sums.divergence <= spec.token_clip, weight_M, 0.0)
        uniform_S = None if self.live_S is None else self.live_S / self.stream.num_ids
        raw_scale_M = (spec.temperature * norms_4M[1] - log_sum_raw_M).exp()
        for b in blocks:
            student_MS[b] = fused.gradient(
                student_MS[b], teacher_MS[b], sums.k[b], divergence_weight_M[b], weight_M[b] * spec.sft_weight,
                raw_scale_M[b], target_M[b], uniform_S, spec,
            )  # fmt: skip
        if slope_MS is not None:
            student_MS *= slope_MS
        if self.student.scale != 1.0:
            student_MS *= self.student.scale
        return values, self._head_backward(student_MS, student_MH)

    def _sum_over_shards(self, stacked_KM: torch.Tensor) -> torch.Tensor:
        """The second reduction. Without it every value but the loss looks right and the gradient is wrong."""
        if self.group_size > 1:
            dist.all_reduce(stacked_KM, group=self.group)
        return stacked_KM

    def _head_backward(self, logit_grad_MS: torch.Tensor, student_MH: torch.Tensor) -> torch.Tensor:
        """Accumulate the head's gradient in fp32; return the shard's part of the hidden gradient."""
        weight_SH = self.student.weight_SH
        low_precision = logit_grad_MS.to(weight_SH.dtype)
        hidden_MH = student_MH.to(weight_SH.dtype)
        if self.student.grad_SH is not None:
            accumulate_outer(self.student.grad_SH, low_precision, hidden_MH)
        if self.student.grad_bias_S is not None:
            self.student.grad_bias_S += logit_grad_MS.sum(0)
        return matmul_fp32(low_precision, weight_SH)

    def _token_blocks(self, logits_MS: torch.Tensor) -> list[slice]:
        num_tokens, width = logits_MS.shape
        step = num_tokens if self.stream.compiled else max(1, ELEMENTWISE_BLOCK_BYTES // (4 * width))
        return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


@dataclass(frozen=True)
class _Kernels:
    statistics: Callable
    sums: Callable
    gradient: Callable


@functools.cache
def _kernels(compiled: bool) -> _Kernels:
    """The element-wise functions, eager or compiled; dynamic shapes, as chunks vary in length."""
    functions = (kernels.shard_statistics, kernels.shard_sums, kernels.logit_gradient)
    if compiled:
        functions = tuple(torch.compile(function, dynamic=True) for function in functions)
    return _Kernels(*functions)

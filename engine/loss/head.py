"""The head of a causal LM as row blocks: which vocabulary rows a rank computes, and how they get there.

ZeRO-3 stores `lm_head.weight [V, H]` flat, cut in one piece per rank; a piece is a block of vocabulary rows
with ragged ends. `VocabLayout` turns pieces into whole rows: a row belongs to the piece that it starts in.
`StudentHead` collects a rank's rows at the start of an optimizer step and hands their gradient back at its
end; `build_teacher_head` fetches the teacher's rows for the same ids once.

Ranks are laid out in two dimensions. `vocab_parallel_size` G consecutive ranks form a token group that covers
the vocabulary between them; the ranks with the same place in their group hold the same shard, the union of
their pieces.

Shapes: V vocabulary, H hidden, S rows of one shard (a few of them padding), N ranks, G ranks of a token group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.cluster.collectives import (
    VocabGroups,
    all_gather_rows,
    check_divides,
    pass_along,
    reduce_scatter_rows,
    sum_over_world,
)
from engine.zero import partitions


@dataclass(frozen=True)
class HeadSpec:
    """How a model turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    tied: bool
    scale: float
    softcap: float | None
    num_rows: int
    hidden_size: int


@dataclass(frozen=True)
class VocabLayout:
    """Which vocabulary rows of a flat-partitioned [num_rows, row_size] matrix each rank owns and computes.

    Raises:
        ValueError: where a piece is smaller than one row, or G does not divide the number of ranks.
    """

    num_rows: int
    row_size: int
    world_size: int
    group_size: int

    def __post_init__(self) -> None:
        check_divides("vocab_parallel_size", self.group_size, self.world_size)
        if self.num_rows < self.world_size:
            raise ValueError(f"a head of {self.num_rows} rows cannot be cut over {self.world_size} ranks: use fewer")

    @property
    def piece_size(self) -> int:
        """Elements of one rank's piece; the last piece is padded to it."""
        return -(-self.num_rows * self.row_size // self.world_size)

    @property
    def rows_per_piece(self) -> int:
        """Rows that every piece is padded to, so that all ranks exchange blocks of one size."""
        return max(stop - start for start, stop in map(self.rows_of_piece, range(self.world_size)))

    def rows_of_piece(self, piece: int) -> tuple[int, int]:
        """The rows that start in a piece, as (first, last + 1)."""
        first, stop = (-(-edge * self.piece_size // self.row_size) for edge in (piece, piece + 1))
        return min(first, self.num_rows), min(stop, self.num_rows)

    def lead_size(self, piece: int) -> int:
        """Elements at the start of a piece that belong to a row of the piece before it."""
        return max(0, self.rows_of_piece(piece)[0] * self.row_size - piece * self.piece_size)

    @property
    def has_split_rows(self) -> bool:
        return any(self.lead_size(piece) for piece in range(self.world_size))

    def shard_ids(self, rank: int) -> torch.Tensor:
        """Vocabulary id of each of the shard's rows, int64 [S] on CPU; -1 marks padding."""
        ids = torch.full((self.world_size // self.group_size, self.rows_per_piece), -1, dtype=torch.long)
        for replica, piece in enumerate(range(rank % self.group_size, self.world_size, self.group_size)):
            first, stop = self.rows_of_piece(piece)
            ids[replica, : stop - first] = torch.arange(first, stop)
        return ids.flatten()


@dataclass
class HeadShard:
    """A rank's rows of one head, ready for the stream.

    Attributes:
        weight_SH: rows in compute dtype (fp32 on CPU, whose GEMM has no fp32 output for bf16 input).
        bias_S: fp32, or None.
        masked_columns: int64, columns without an id of the shared vocabulary; their logits are -inf.
        grad_SH, grad_bias_S: fp32 accumulators, or None where no gradient is wanted.
    """

    weight_SH: torch.Tensor
    bias_S: torch.Tensor | None
    masked_columns: torch.Tensor
    scale: float
    softcap: float | None
    grad_SH: torch.Tensor | None = None
    grad_bias_S: torch.Tensor | None = None


class StudentHead:
    """The student's head on its ZeRO-3 partitions. All ranks must call every method, in the same order.

    Use per optimizer step: `open_step`, any number of divergences on the returned shard, `close_step` after
    the last backward and before the optimizer steps.
    """

    def __init__(self, head: HeadSpec, groups: VocabGroups, shared_vocab_size: int, device: torch.device) -> None:
        self.spec = head
        self.groups = groups
        self.shared_vocab_size = shared_vocab_size
        self.layout = VocabLayout(head.num_rows, head.hidden_size, groups.world_size, groups.group_size)
        self.ids_S = self.layout.shard_ids(groups.rank)
        self.masked_columns = masked_columns(self.ids_S, shared_vocab_size, device)
        self.shard: HeadShard | None = None

    def open_step(self, train: bool) -> HeadShard:
        """Collect this rank's rows as the weights stand now. Moves H * (V/G) * (1 - G/N) elements per rank."""
        weight_SH = all_gather_rows(self._own_rows(), self.groups.replicas)
        if weight_SH.device.type == "cpu":
            weight_SH = weight_SH.float()
        bias_S = None
        if self.spec.bias is not None:
            bias_S = select_rows(partitions.full_value(self.spec.bias).float(), self.ids_S)
        self.shard = HeadShard(weight_SH, bias_S, self.masked_columns, self.spec.scale, self.spec.softcap)
        if train and self.spec.weight.requires_grad:
            self.shard.grad_SH = torch.zeros_like(weight_SH, dtype=torch.float32)
            if bias_S is not None and self.spec.bias is not None and self.spec.bias.requires_grad:
                self.shard.grad_bias_S = torch.zeros_like(bias_S)
        return self.shard

    def _own_rows(self) -> torch.Tensor:
        """The rows that start in this rank's piece, padded to a common number, [R, H]; a view where they fit."""
        layout, rank = self.layout, self.groups.rank
        piece = partitions.local_piece(self.spec.weight)
        first, stop = layout.rows_of_piece(rank)
        size, lead = (stop - first) * layout.row_size, layout.lead_size(rank)
        if not layout.has_split_rows and stop - first == layout.rows_per_piece:
            return piece[:size].view(-1, layout.row_size)
        rows_RH = piece.new_zeros(layout.rows_per_piece, layout.row_size)
        flat = rows_RH.view(-1)[:size]
        own = piece[lead : lead + size]
        flat[: own.numel()] = own
        if layout.has_split_rows:  # the rest of the last row is what the next rank's piece starts with
            flat[own.numel() :] = pass_along(piece[:lead], layout.row_size, self.groups, step=-1)[: size - own.numel()]
        return rows_RH

    def close_step(self) -> None:
        """Sum the step's head gradient over the ranks and put it into the ZeRO-3 gradient partition.

        A tied head's partition already holds the embedding's gradient from autograd and is added to; an
        untied one holds a stale buffer and is set. Moves H * (V/G) * (1 - G/N) elements per rank, in fp32.
        """
        shard, layout, rank = self.shard, self.layout, self.groups.rank
        self.shard = None
        if shard is None or shard.grad_SH is None:
            return
        rows_RH = reduce_scatter_rows(shard.grad_SH, self.groups.replicas)
        first, stop = layout.rows_of_piece(rank)
        flat = rows_RH.view(-1)[: (stop - first) * layout.row_size]
        lead = layout.lead_size(rank)
        room = layout.piece_size - lead
        piece = flat.new_zeros(layout.piece_size)
        piece[lead : lead + flat.numel()] = flat[:room]
        if layout.has_split_rows:
            piece[:lead] = pass_along(flat[room:], layout.row_size, self.groups, step=1)[:lead]
        partitions.put_local_grad(self.spec.weight, piece, accumulate=self.spec.tied)
        if shard.grad_bias_S is not None:
            self._put_bias_grad(shard.grad_bias_S)

    def _put_bias_grad(self, grad_bias_S: torch.Tensor) -> None:
        """The bias is V numbers: summed whole over all ranks, of which each keeps its ZeRO piece."""
        live = (self.ids_S >= 0).to(grad_bias_S.device)
        grad_V = grad_bias_S.new_zeros(self.spec.num_rows)
        grad_V[self.ids_S.to(grad_V.device)[live]] = grad_bias_S[live]
        sum_over_world(grad_V)
        partitions.put_local_grad(self.spec.bias, partitions.piece_of(grad_V, self.spec.bias), accumulate=False)


def masked_columns(ids_S: torch.Tensor, shared_vocab_size: int, device: torch.device) -> torch.Tensor:
    """Columns that are padding, or ids that only one of the two models has."""
    return torch.nonzero((ids_S < 0) | (ids_S >= shared_vocab_size))[:, 0].to(device)


def select_rows(full: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
    """Rows `ids_S` of a whole tensor; zeros for ids it does not have."""
    ids_S = ids_S.to(full.device)
    live = (ids_S >= 0) & (ids_S < full.shape[0])
    rows = full[ids_S.clamp(0, full.shape[0] - 1)]
    return torch.where(live.view(-1, *[1] * (full.dim() - 1)), rows, 0)


def build_teacher_head(head: HeadSpec, ids_S: torch.Tensor, shared_vocab_size: int, device: torch.device) -> HeadShard:
    """The teacher's rows for the student shard's ids, on `device`, where they stay. All ranks must call.

    Moves the teacher's head once, a piece at a time, where it is partitioned; nothing where it is replicated. The rows
    keep the teacher's dtype wherever its parameters lie, but for fp32 rows to compute with on CPU.
    """
    weight_SH = partitions.fetch_rows(head.weight, ids_S).to(device)
    if weight_SH.device.type == "cpu":
        weight_SH = weight_SH.float()
    bias_S = None
    if head.bias is not None:
        bias_S = select_rows(partitions.full_value(head.bias).float(), ids_S).to(device)
    return HeadShard(weight_SH, bias_S, masked_columns(ids_S, shared_vocab_size, device), head.scale, head.softcap)

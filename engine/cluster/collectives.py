"""Process groups, the collectives of the loss, and draws that every rank makes alike.

Knows tensors and ranks; nothing of models, ZeRO or the loss. Every function that communicates says "All ranks
must call", and calls its collectives in the same order on each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

REDUCE_SLICE_BYTES = 64 * 2**20  # bounds the receive buffer of `reduce_scatter_rows`


@dataclass(frozen=True)
class VocabGroups:
    """The two-dimensional layout: token groups of `group_size` consecutive ranks, and replicas across them.

    Attributes:
        tokens: this rank's token group; its members exchange hidden states and cover the vocabulary together.
        replicas: the ranks with this rank's place in their token group; they hold the same vocabulary rows.
    """

    rank: int
    world_size: int
    group_size: int
    tokens: dist.ProcessGroup
    replicas: dist.ProcessGroup

    @property
    def group_ranks(self) -> range:
        """Global ranks of this rank's token group."""
        start = self.rank - self.rank % self.group_size
        return range(start, start + self.group_size)


def check_divides(field: str, size: int, world_size: int) -> None:
    """Raise ValueError where groups of `size` ranks, which `field` sets, do not cover the ranks."""
    if world_size % size:
        raise ValueError(f"{field}={size} must divide the number of ranks, {world_size}")


def build_vocab_groups(group_size: int | str, ranks_per_node: int) -> VocabGroups:
    """Process groups for `vocab_parallel_size`; "auto" is the node. All ranks must call.

    Raises:
        ValueError: where the size does not divide the number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if group_size == "auto":
        size = ranks_per_node if world_size % ranks_per_node == 0 else world_size
    else:
        size = int(group_size)
    check_divides("vocab_parallel_size", size, world_size)
    tokens = replicas = None
    for start in range(0, world_size, size):
        ranks = list(range(start, start + size))
        group = dist.new_group(ranks)
        tokens = group if rank in ranks else tokens
    for place in range(size):
        ranks = list(range(place, world_size, size))
        group = dist.new_group(ranks)
        replicas = group if rank in ranks else replicas
    return VocabGroups(rank, world_size, size, tokens, replicas)


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate equally shaped tensors along their first dimension. All ranks of the group must call."""
    size = dist.get_world_size(group)
    if size == 1:
        return rows
    gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def start_gather_span(
    rows: torch.Tensor, start: int, stop: int, group: dist.ProcessGroup
) -> Callable[[], torch.Tensor]:
    """Start to concatenate rows `start:stop` of every rank of the group, zeros where one has fewer; the function
    returned waits for them. All ranks of the group must call."""
    block = rows[start:stop]
    size = dist.get_world_size(group)
    if size == 1:
        return lambda: block
    if block.shape[0] < stop - start:
        block = torch.cat([block, block.new_zeros(stop - start - block.shape[0], block.shape[1])])
    sent = block.contiguous()
    gathered = sent.new_empty(size * sent.shape[0], sent.shape[1])
    work = dist.all_gather_into_tensor(gathered, sent, group=group, async_op=True)
    return lambda: _wait(work, gathered, sent)


def start_exchange(blocks: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Start to hand the n-th block of rows to the group's n-th rank; the function returned waits for what the ranks
    sent here, in their order. All ranks of the group must call."""
    received = torch.empty_like(blocks)
    work = dist.all_to_all_single(received, blocks, group=group, async_op=True)
    return lambda: _wait(work, received, blocks)


def _wait(work: dist.Work, result: torch.Tensor, keep_alive: torch.Tensor) -> torch.Tensor:
    """Wait for an asynchronous collective; `keep_alive` is the buffer that it reads."""
    work.wait()
    return result


def reduce_scatter_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum [n*R, ...] over the group's n ranks and keep this rank's R rows. All ranks of the group must call.

    An all-to-all with a local sum: the volume of a ring reduce-scatter, one rounding, and the same order of
    addition everywhere (gloo's own reduce-scatter moves twice the bytes).
    """
    size = dist.get_world_size(group)
    if size == 1:
        return rows
    num_rows = rows.shape[0] // size
    blocks = rows.view(size, num_rows, -1)
    result = rows.new_empty(num_rows, blocks.shape[-1])
    slice_rows = max(1, REDUCE_SLICE_BYTES // (size * blocks.shape[-1] * rows.element_size()))
    for start in range(0, num_rows, slice_rows):
        sent = blocks[:, start : start + slice_rows].contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        result[start : start + slice_rows] = received.sum(0)
    return result.view(num_rows, *rows.shape[1:])


def pass_along(values: torch.Tensor, size: int, groups: VocabGroups, step: int) -> torch.Tensor:
    """Send up to `size` elements to the rank `step` (+1 or -1) away; return what arrives from the other side,
    zero-padded to `size`. The ends of the line send or receive nothing. All ranks must call."""
    sent, received = values.new_zeros(size), values.new_zeros(size)
    sent[: values.numel()] = values
    to, source = groups.rank + step, groups.rank - step
    operations = []
    if 0 <= to < groups.world_size:
        operations.append(dist.P2POp(dist.isend, sent, to))
    if 0 <= source < groups.world_size:
        operations.append(dist.P2POp(dist.irecv, received, source))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return received


def sum_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks. All ranks must call."""
    dist.all_reduce(tensor)
    return tensor


def gather_counts(counts: list[int], device: torch.device) -> torch.Tensor:
    """Every rank's list of counts, int64 [ranks, len] on CPU; one collective and one read. All ranks must call."""
    local = torch.tensor([counts], dtype=torch.long, device=device)
    gathered = local.new_empty(dist.get_world_size(), len(counts))
    dist.all_gather_into_tensor(gathered, local)
    return gathered.cpu()


def all_gather_lists(lists: list[list[int]], device: torch.device) -> list[list[list[int]]]:
    """Every rank's lists of integers, ragged, in rank order. Three small collectives. All ranks must call."""
    num_lists = int(gather_counts([len(lists)], device).max())
    lengths = gather_counts([len(row) for row in lists] + [-1] * (num_lists - len(lists)), device)
    width = int(lengths.clamp_min(0).sum(1).max())
    flat = torch.zeros(1, width, dtype=torch.long, device=device)
    values = [value for row in lists for value in row]
    flat[0, : len(values)] = torch.tensor(values, dtype=torch.long, device=device)
    rows = all_gather_rows(flat, dist.group.WORLD).tolist()
    result = []
    for rank_lengths, row in zip(lengths.tolist(), rows, strict=True):
        ends = [0]
        for length in rank_lengths:
            ends.append(ends[-1] + max(0, length))
        pairs = zip(ends, ends[1:], rank_lengths, strict=False)
        result.append([row[start:stop] for start, stop, length in pairs if length >= 0])
    return result


def draw_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on its parts only: same on every rank, in every run, at any world size."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shared_uniform(*parts: int | str) -> float:
    """A uniform draw from [0, 1) that depends on its parts only, such as (seed, step)."""
    return draw_seed(*parts) / 2**63

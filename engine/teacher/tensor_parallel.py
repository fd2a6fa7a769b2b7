"""A teacher split over a few ranks by DeepSpeed's automatic tensor parallelism (AutoTP, deepspeed 0.19.8).

The ranks of a group hold different columns and rows of every layer and must run the same input together: their
micro-batches are exchanged, concatenated into one packed row, scored once, and each rank takes its own positions back.
The head stays outside: its rows for this rank's vocabulary shard are taken from the loaded model.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from engine.cluster.collectives import all_gather_rows, check_divides
from engine.data.batch import PackedBatch
from engine.models.backbone import packed_inputs
from engine.models.structure import position_rows, text_backbone
from engine.teacher.interface import LocalTeacher


class TensorParallelTeacher(LocalTeacher):
    """`hidden` must be called by all ranks of the group together."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(model, model)
        self._group, self._size, self._place = group, dist.get_world_size(group), dist.get_rank(group)
        engine = deepspeed.init_inference(
            text_backbone(model),
            dtype=model.dtype,
            replace_with_kernel_inject=False,
            # 0.19.8 takes the size from mpu and the group to slice by from tp_group; without the latter nothing is cut
            tensor_parallel={"mpu": _GroupOnly(group), "tp_group": group, "tp_size": self._size},
        )
        self._backbone = engine.module
        self._position_rows = position_rows(model.config)

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        sizes = all_gather_rows(
            torch.tensor([[batch.input_ids_T.numel(), batch.predictor_N.numel()]], device=batch.input_ids_T.device),
            self._group,
        ).tolist()
        ids, positions = self._exchange(batch.input_ids_T, batch.position_ids_T, [t for t, _ in sizes])
        output = self._backbone(**packed_inputs(ids, positions, self._position_rows))
        start = sum(t for t, _ in sizes[: self._place])
        return output.last_hidden_state[0].index_select(0, batch.predictor_N + start)

    def _exchange(self, ids_T: torch.Tensor, positions_T: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
        """All ranks' packed rows, one after the other."""
        padded = ids_T.new_zeros(1, 2, max(lengths))
        padded[0, 0, : ids_T.numel()], padded[0, 1, : ids_T.numel()] = ids_T, positions_T
        rows = all_gather_rows(padded, self._group)
        return tuple(
            torch.cat([row[column, :length] for row, length in zip(rows, lengths, strict=True)]) for column in (0, 1)
        )


class _GroupOnly:
    """The part of Megatron's `mpu` that init_inference asks for: which ranks share the model."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._group)

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    get_tensor_model_parallel_rank = get_model_parallel_rank


def build_group(size: int) -> dist.ProcessGroup:
    """This rank's group of `size` consecutive ranks. All ranks must call.

    Raises:
        ValueError: where the size does not divide the number of ranks.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    check_divides("teacher_tp_size", size, world_size)
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world_size, size)]
    return groups[rank // size]

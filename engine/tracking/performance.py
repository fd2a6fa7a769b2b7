"""What a step costs: model FLOPs and memory.

Figures are those of the rank that reports, which is the main one. Nothing here contains a collective.
"""

from __future__ import annotations

import resource

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from engine.data.batch import PackedBatch
from engine.zero import partitions

# Dense bf16 peak of one device, in FLOP/s, from the makers' data sheets; the first name found in the device's counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "MI300X": 1307e12,
}  # fmt: skip


def matrix_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that multiply every token, and those of the head, which multiply response tokens alone."""
    head = model.get_output_embeddings().weight
    skipped = {id(head), id(model.get_input_embeddings().weight)}
    shapes = [partitions.full_shape(param) for param in model.parameters() if id(param) not in skipped]
    return sum(shape.numel() for shape in shapes if len(shape) >= 2), partitions.full_shape(head).numel()


class Meter:
    """Model FLOPs of a step (what the algorithm needs, not what recomputation adds), and the peak of memory.

    Matrix multiplications by parameters alone count, 2 FLOPs per parameter and token forward and 4 backward;
    attention scores are left out, and a mixture of experts would count all of its experts, so it has no figure.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = matrix_parameters(student), matrix_parameters(teacher)
        self.is_sparse = any(hasattr(module, "experts") for model in (student, teacher) for module in model.modules())
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else get_accelerator().device_name()
        self.peak_flops = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)

    def step_flops(self, batches: list[PackedBatch], student_writes: bool, teacher_writes: bool) -> float:
        """Of this rank's micro-batches: the student's forward and backward, the teacher's forward, the rollout."""
        positions = sum(batch.input_ids_T.numel() for batch in batches)
        responses = sum(batch.num_response_tokens for batch in batches)

        def forward(parameters: tuple[int, int]) -> float:
            return 2.0 * (parameters[0] * positions + parameters[1] * responses)

        student, teacher = forward(self.student), forward(self.teacher)
        return (3 + student_writes) * student + (1 + teacher_writes) * teacher

    def metrics(
        self, batches: list[PackedBatch], student_writes: bool, teacher_writes: bool, step_s: float
    ) -> dict[str, float]:
        """`perf/tflops_per_s` of this rank, `perf/mfu` where the device's peak is known, `perf/memory_peak_gib`."""
        figures = {"perf/memory_peak_gib": memory_peak_bytes() / 2**30}
        if self.is_sparse:
            return figures
        flops_per_s = self.step_flops(batches, student_writes, teacher_writes) / step_s
        figures["perf/tflops_per_s"] = flops_per_s / 1e12
        if self.peak_flops is not None:
            figures["perf/mfu"] = flops_per_s / self.peak_flops
        return figures


def memory_peak_bytes() -> int:
    """Most memory that this rank has held: the accelerator's tensors, or the process on CPU."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()

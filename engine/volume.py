"""How many bytes the loss and the teacher move: the formulas in README, compared with measured bytes in tests.

N ranks in token groups of G; V vocabulary, H_s and H_t hidden sizes, T tokens of one rank (response tokens for the
loss, all of them for the teacher).
"""

from __future__ import annotations

FLOAT_BYTES = 4


def head_bytes(num_rows: int, hidden_size: int, world_size: int, group_size: int, weight_bytes: int) -> float:
    """Sent per rank and optimizer step: the rows gathered in the weights' dtype, their gradient returned in fp32.

    H_s (V/G) (1 - G/N) elements each way.
    """
    elements = hidden_size * num_rows / group_size * (1 - group_size / world_size)
    return elements * (weight_bytes + FLOAT_BYTES)


def hidden_bytes(tokens: int, student_hidden: int, teacher_hidden: int, group_size: int, element_bytes: int) -> float:
    """Sent per rank and micro-batch: hidden states out, the student's gradient back.

    (G - 1) T (2 H_s + H_t) elements.
    """
    return (group_size - 1) * tokens * (2 * student_hidden + teacher_hidden) * element_bytes


def scalar_bytes(tokens: int, group_size: int) -> float:
    """Sent per rank and micro-batch besides: weights and targets (2 fp64), softmax statistics (7 fp32 from each rank
    for each of the group's G T tokens), and the sums (6 fp32, all-reduced)."""
    per_token = 2 * 8 + 7 * FLOAT_BYTES * group_size + 2 * 6 * FLOAT_BYTES
    return (group_size - 1) * tokens * per_token


def zero3_forward_bytes(num_params: int, world_size: int, element_bytes: int) -> float:
    """Sent per rank and forward pass of a ZeRO-3 model: each of its pieces to every other rank, P (N - 1) / N elements.

    `num_params` counts what the forward pass fetches: not the head, and not what ZeRO keeps whole
    (`stage3_param_persistence_threshold`).
    """
    return num_params * (world_size - 1) / world_size * element_bytes


def tensor_parallel_forward_bytes(
    tokens: int, num_layers: int, hidden: int, group_size: int, element_bytes: int
) -> float:
    """Sent per rank and forward pass of a teacher split over k ranks: two all-reduces a layer over the k micro-batches
    that are scored together, 2 L k T H_t elements each of which travels 2 (k - 1) / k times."""
    return 2 * num_layers * group_size * tokens * hidden * 2 * (group_size - 1) / group_size * element_bytes

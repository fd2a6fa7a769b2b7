"""How many bytes the loss and the teacher move: the formulas of their READMEs, compared with measured bytes in tests.

N ranks in token groups of G; V vocabulary, H_s and H_t hidden sizes, T tokens of one rank (response tokens for the
loss, all of them for the teacher).
"""

from __future__ import annotations

FLOAT_BYTES, DOUBLE_BYTES = 4, 8
DOUBLES_SENT = 2  # per token: its weight and its target
STATISTICS = 5  # fp32 per token and rank: maximum and sum of exponentials of both logits, the raw sum of the student's
SUMS = 7  # fp32 per token, all-reduced: what the divergences and the metrics add up over the vocabulary
REDUCES_PER_LAYER = 2  # of a tensor-parallel layer: after its attention and after its MLP
ALL_REDUCE = 2  # times that an all-reduced element travels, out and back


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
    """Sent per rank and micro-batch besides: weights and targets, softmax statistics (from each rank for each of the
    group's G T tokens), and the sums."""
    per_token = DOUBLES_SENT * DOUBLE_BYTES + FLOAT_BYTES * (STATISTICS * group_size + ALL_REDUCE * SUMS)
    return (group_size - 1) * tokens * per_token


def tensor_parallel_forward_bytes(
    tokens: int, num_layers: int, hidden: int, group_size: int, element_bytes: int
) -> float:
    """Sent per rank and forward pass of a teacher split over k ranks: two all-reduces a layer over the k micro-batches
    that are scored together, 2 L k T H_t elements each of which travels 2 (k - 1) / k times."""
    elements = REDUCES_PER_LAYER * num_layers * group_size * tokens * hidden
    return elements * ALL_REDUCE * (group_size - 1) / group_size * element_bytes


def zero3_gather_bytes(num_elements: int, world_size: int, weight_bytes: int) -> float:
    """Sent per rank when ZeRO-3 gathers parameters once: (1 - 1/N) of their elements.

    A step gathers the backbone (all but the head, and but the small ones that stay whole) in each forward and, unless
    `stage3_max_reuse_distance` keeps them, again in each backward; the teacher's in each forward; a rollout everything.
    """
    return num_elements * (1 - 1 / world_size) * weight_bytes


def zero3_gradient_bytes(num_elements: int, world_size: int, gradient_bytes: int, is_gloo: bool) -> float:
    """Sent per rank when ZeRO-3 reduces and scatters the backbone's gradient, once per micro-batch: as a gather; twice
    that on gloo, which all-reduces."""
    return num_elements * (1 - 1 / world_size) * gradient_bytes * (ALL_REDUCE if is_gloo else 1)


def leaving_host_ring(sent_bytes: float) -> float:
    """Bytes that leave a host for the next one when a ring collective spans hosts of consecutive ranks: one rank's."""
    return sent_bytes


def leaving_host_exchange(sent_bytes: float, world_size: int, ranks_per_host: int) -> float:
    """Bytes that leave a host in an all-to-all, in which each of its ranks sends everyone else an equal part."""
    return sent_bytes * ranks_per_host * (world_size - ranks_per_host) / (world_size - 1)

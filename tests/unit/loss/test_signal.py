"""What a teacher says: the stream takes any kind of signal, and the resident rows lie where they are computed with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from engine.loss.divergence import DivergenceSpec
from engine.loss.head import HeadShard, HeadSpec, build_teacher_head
from engine.loss.signal import HiddenSignal
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence

NONE_MASKED = torch.empty(0, dtype=torch.long)


@dataclass
class LogitSignal:
    """Another kind than the engine's: whole logits, as if a server had sent them."""

    logits_NV: torch.Tensor
    floats_in_flight: int = 0

    def start(self, start, stop, groups):
        assert groups.group_size == 1
        return lambda temperature: self.logits_NV[start:stop] / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_stream_takes_another_kind_of_signal(alone, temperature):
    torch.manual_seed(0)
    hidden, teacher_hidden, targets = torch.randn(9, 8), torch.randn(9, 6), torch.arange(9)
    weight, teacher_weight = torch.randn(50, 8), torch.randn(50, 6)
    teacher = HeadShard(teacher_weight, None, NONE_MASKED, 1.0, None)
    spec, stream = DivergenceSpec("jsd", beta=0.3, temperature=temperature), Stream(alone, torch.arange(50), 1)
    assert stream.chunk_tokens(8, LogitSignal(teacher_hidden), False) == 1  # several chunks
    results = []
    for signal in (HiddenSignal(teacher_hidden, teacher), LogitSignal(teacher_hidden @ teacher_weight.t())):
        student = HeadShard(weight, None, NONE_MASKED, 1.0, None, torch.zeros(50, 8))
        leaf = hidden.clone().requires_grad_()
        loss, values = vocab_parallel_divergence(leaf, signal, student, targets, torch.ones(9), 9, spec, stream)
        loss.backward()
        results.append((loss.detach(), *values, leaf.grad, student.grad_SH))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[0][-1].norm() > 0.1


def test_resident_rows_go_to_the_device_of_the_run_in_the_teachers_dtype():
    """Of a teacher that is offloaded to CPU; `meta` stands for the accelerator."""
    weight, bias = nn.Parameter(torch.ones(10, 4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(10))
    spec, ids_S = HeadSpec(weight, bias, False, 1.0, None, 10, 4), torch.tensor([1, 3, -1, 12])
    on_device = build_teacher_head(spec, ids_S, 10, torch.device("meta"))
    assert {t.device.type for t in (on_device.weight_SH, on_device.bias_S, on_device.masked_columns)} == {"meta"}
    assert on_device.weight_SH.dtype == torch.bfloat16 and on_device.bias_S.dtype == torch.float32
    on_cpu = build_teacher_head(spec, ids_S, 10, torch.device("cpu"))
    assert on_cpu.weight_SH.dtype == torch.float32  # whose products have no fp32 result for bf16
    assert on_cpu.weight_SH[:, 0].tolist() == [1, 1, 0, 0] and on_cpu.masked_columns.tolist() == [2, 3]

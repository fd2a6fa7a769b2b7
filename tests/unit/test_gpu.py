"""What only a GPU can show: bf16 GEMMs with an fp32 result, and the compiled element-wise part on the device."""

from __future__ import annotations

import pytest
import torch

from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.projection import accumulate_outer, matmul_fp32
from engine.loss.vocab_parallel import _kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_bf16_products_keep_their_fp32_accumulator():
    torch.manual_seed(0)
    a, b = (torch.randn(64, 512, device="cuda").bfloat16() for _ in range(2))
    exact = a.double() @ b.double().t()
    ours = matmul_fp32(a, b.t())
    assert ours.dtype == torch.float32
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-5
    total = torch.zeros(512, 512, device="cuda")
    accumulate_outer(total, a, b)
    exact = a.double().t() @ b.double()
    assert ((total - exact).norm() / exact.norm()).item() < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_element_wise_part_on_the_device(compiled):
    torch.manual_seed(0)
    z, t = torch.randn(32, 1000, device="cuda"), torch.randn(32, 1000, device="cuda")
    spec, kernels = DivergenceSpec("jsd", beta=0.3), _kernels(compiled)
    stats = kernels.statistics(z, t, 1.0)
    norms = torch.stack([stats[0], stats[1].log(), stats[2], stats[3].log()])
    targets, ones = torch.zeros(32, dtype=torch.long, device="cuda"), torch.ones(32, device="cuda")
    sums, q, u = kernels.sums(z, t, norms, targets, spec)
    gradient = kernels.gradient(q, u, sums[1], ones, 0 * ones, ones, targets, spec)
    leaf = z.double().requires_grad_()
    dense_divergence(leaf, t.double(), spec).sum().backward()
    assert ((gradient - leaf.grad).norm() / leaf.grad.norm()).item() < 1e-5

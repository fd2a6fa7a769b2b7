"""From hidden states to a shard's logits and back: the matrix products of the stream, in fp32.

Shapes: M tokens of a chunk, S rows of the shard, H hidden.
"""

from __future__ import annotations

import torch

from engine.loss.divergence import LOG_ZERO
from engine.loss.head import HeadShard


def project(hidden_MH: torch.Tensor, head: HeadShard, temperature: float = 1.0) -> torch.Tensor:
    """fp32 logits of the shard's rows, divided by the temperature, [M, S]."""
    logits_MS = matmul_fp32(hidden_MH.to(head.weight_SH.dtype), head.weight_SH.t())
    if head.bias_S is not None:
        logits_MS += head.bias_S.clamp_min(LOG_ZERO)
    if head.scale != 1.0:
        logits_MS *= head.scale
    if head.softcap is not None:
        logits_MS.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1.0:
        logits_MS.div_(temperature)
    if head.masked_columns.numel():
        logits_MS.index_fill_(1, head.masked_columns, LOG_ZERO)
    return logits_MS


def softcap_slope(tempered_MS: torch.Tensor, head: HeadShard, temperature: float) -> torch.Tensor | None:
    """Derivative of the soft cap at logits that are capped and tempered already; None without one."""
    if head.softcap is None:
        return None
    return 1 - (tempered_MS * (temperature / head.softcap)).clamp_(-1.0, 1.0).square_()


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with the GEMM's fp32 accumulator as the result. Only CUDA has such a GEMM for bf16; on CPU the
    operands are fp32 already."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def accumulate_outer(total_SH: torch.Tensor, grad_MS: torch.Tensor, hidden_MH: torch.Tensor) -> None:
    """total += grad.T @ hidden in fp32, in row slices where the product needs a buffer of its own."""
    if grad_MS.dtype == torch.float32:
        total_SH.addmm_(grad_MS.t(), hidden_MH)
        return
    for start in range(0, total_SH.shape[0], 8192):
        rows = slice(start, start + 8192)
        total_SH[rows] += matmul_fp32(grad_MS[:, rows].t(), hidden_MH)

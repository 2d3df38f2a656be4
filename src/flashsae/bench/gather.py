"""The gather that a sparse decode is made of and nothing else: a ceiling to measure it against. Needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_sum_kernel(table, indices, out, k, d, BLOCK_D: tl.constexpr):
    """Sum k rows of the table for one token and one block of columns."""
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for j in tl.range(0, k, loop_unroll_factor=8):
        row = tl.load(indices + token * k + j)
        total += tl.load(table + row * d + columns).to(tl.float32)
    tl.store(out + token * d + columns, total.to(out.dtype.element_ty))


def gather_sum(table: Tensor, indices: Tensor, out: Tensor) -> None:
    """Write to out, [B, d], the sums of the rows of table, [n, d], that indices, [B, k], name; d divides by 1024."""
    tokens, k = indices.shape
    d = table.shape[1]
    gather_sum_kernel[(tokens, d // 1024)](table, indices, out, k, d, BLOCK_D=1024, num_warps=4)


def gather_problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table of 16 MB, which the cache holds, indices and room for the result."""
    table = torch.randn(4096, 2048, dtype=torch.float32, device=device).bfloat16()
    indices = torch.randint(4096, (8192, 64), dtype=torch.int64, device=device)
    return table, indices, torch.empty(8192, 2048, dtype=torch.bfloat16, device=device)

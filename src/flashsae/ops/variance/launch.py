"""Launch the variance of a batch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.validate import rows_contiguous
from flashsae.ops.variance import kernels

ROWS = 64
"""Tokens of a piece."""


def launch_total_variance(x: Tensor) -> Tensor:
    """Return Σ‖x − mean‖², a float32 scalar."""
    x = rows_contiguous(x)
    B, d = x.shape
    pieces, blocks = triton.cdiv(B, ROWS), triton.cdiv(d, 64)
    means, squares = torch.empty(2, pieces, d, dtype=torch.float32, device=x.device).unbind(0)
    out = torch.empty(blocks, dtype=torch.float32, device=x.device)
    kernels.variance_pieces_kernel[(pieces, blocks)](
        x, means, squares, B, d, x.stride(0), ROWS=ROWS, BLOCK_D=64, num_warps=4
    )
    kernels.variance_total_kernel[(blocks,)](
        means, squares, out, B, d, pieces, ROWS=ROWS, BLOCK_P=32, BLOCK_D=64, num_warps=4
    )
    return out.sum()

"""Allocate and launch: sparse codes written densely."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.dense import kernels
from flashsae.ops.validate import packed

LARGEST_K = 4096
"""What a program holds in registers."""


def launch_dense_code(top_acts: Tensor, top_indices: Tensor, d_sae: int, dtype: torch.dtype) -> Tensor:
    """Return the dense code: [B, d_sae], `dtype`; entries are summed in float32 and rounded once."""
    top_acts, top_indices = packed(top_acts, top_indices)
    B, k = top_indices.shape
    code = torch.empty(B, d_sae, dtype=dtype, device=top_indices.device)
    if code.numel():
        marks = code.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        block_k = triton.next_power_of_2(max(1, k))
        kernels.dense_code_kernel[(B,)](
            top_acts, top_indices, code, marks, k, d_sae,
            BLOCK_N=1024, BLOCK_K=block_k, num_warps=max(2, min(8, block_k // 128)),
        )  # fmt: skip
    return code

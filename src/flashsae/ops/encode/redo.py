"""Rows of which too many latents would have to be rescored: done as a whole, in float32."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.encode import certify_kernels
from flashsae.ops.encode.keys import Keys

REDO_PROGRAMS = 32
"""Rows redone in float32 at once; each needs two scratch rows of d_sae numbers."""


def redo_rows(
    x: Tensor, W: Tensor, keys: Keys, k: int, counts: Tensor, capacity: int, out: tuple[Tensor, Tensor]
) -> None:
    """Select from all latents of the rows whose count exceeds the capacity, and write that to `out`.

    Args:
        x: [rows, d].
        W: [d_sae, d].
        keys: what latents are selected by, packed.
        k: how many are.
        counts: [rows], int32.
        capacity: up to which a row is done already.
        out: values [rows, k] and latents [rows, k].
    """
    rows, n, block_k = len(x), len(W), triton.next_power_of_2(k)
    programs = min(rows, REDO_PROGRAMS)
    values = torch.empty(programs, n, dtype=torch.float32, device=x.device)
    certify_kernels.encode_topk_redo_kernel[(programs,)](
        x, W, counts, keys.b_enc, keys.scale, values, torch.empty_like(values, dtype=torch.int32),
        torch.empty(programs, block_k, dtype=torch.int32, device=x.device), *out,
        rows, n, x.shape[1], k, x.stride(0), W.stride(0),
        CAPACITY=capacity, BLOCK_N=64, BLOCK_D=min(128, triton.next_power_of_2(x.shape[1])), BLOCK_G=4096,
        BLOCK_K=block_k, MAGNITUDE=keys.magnitude, num_warps=8,
    )  # fmt: skip

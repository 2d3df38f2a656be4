"""Allocate and launch the segment sums."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.latent_rows import kernels
from flashsae.ops.latent_rows.reference import RUN
from flashsae.ops.pattern import LatentIndex
from flashsae.ops.validate import packed, rows_contiguous


def launch_partial(index: LatentIndex, coeffs: Tensor, rows: Tensor) -> Tensor:
    """Sum the pieces of runs longer than RUN: [pieces, 2, d], as `sum_run` reads them; all packed."""
    nnz, d = index.entries.numel(), rows.shape[1]  # those of a part are fewer than coefficients
    pieces = triton.cdiv(nnz, RUN)
    partial = torch.empty(pieces, 2, d, dtype=torch.float32, device=rows.device)
    block_d = min(512, triton.next_power_of_2(d))
    kernels.latent_rows_partial_kernel[(pieces, triton.cdiv(d, block_d))](
        index.entries, index.tokens, index.latents, index.offsets, coeffs, rows, partial,
        nnz, None if index.tokens is None else index.d_sae, index.k, d, rows.stride(0),
        RUN=RUN, BLOCK_E=4, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip
    return partial


def launch_latent_rows(index: LatentIndex, coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return segment sums [d_sae, d]."""
    index, coeffs, rows = packed_index(index), packed(coeffs), rows_contiguous(rows)
    d = rows.shape[1]
    out = torch.empty(index.d_sae, d, dtype=dtype, device=rows.device)
    if index.entries.numel() == 0 or d == 0:
        return out.zero_()
    partial = launch_partial(index, coeffs, rows)
    block_d, block_n = min(512, triton.next_power_of_2(d)), 8
    kernels.latent_rows_sum_kernel[(triton.cdiv(index.d_sae, block_n), triton.cdiv(d, block_d))](
        index.entries, index.tokens, index.latents, index.offsets, coeffs, rows, partial, out,
        index.d_sae, index.k, d, rows.stride(0),
        RUN=RUN, BLOCK_N=block_n, BLOCK_E=2, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip
    return out


def launch_latent_sums(index: LatentIndex, coeffs: Tensor) -> Tensor:
    """Return the sum of the coefficients of each latent: [d_sae], float32."""
    index, coeffs = packed_index(index), packed(coeffs)
    sums = torch.empty(index.d_sae, dtype=torch.float32, device=coeffs.device)
    nnz = index.entries.numel()
    if nnz == 0:
        return sums.zero_()
    weights = torch.empty(triton.cdiv(nnz, RUN), 2, dtype=torch.float32, device=coeffs.device)
    lists = index.entries, index.latents, index.offsets, coeffs
    kernels.latent_sums_partial_kernel[(len(weights),)](*lists, weights, nnz, RUN=RUN, num_warps=1)
    kernels.latent_sums_kernel[(triton.cdiv(index.d_sae, 32),)](
        *lists, weights, sums, index.d_sae, RUN=RUN, BLOCK_N=32, BLOCK_E=8, num_warps=4
    )
    return sums


def launch_column_sums(coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ coeffs · rows, [d], level by level until one row is left."""
    rows = rows_contiguous(rows)
    n, d = rows.shape
    weights: Tensor | None = packed(coeffs)
    run, tile = 256, {"BLOCK_E": 32, "BLOCK_D": 128}
    while True:
        pieces = triton.cdiv(n, run)
        out = torch.empty(max(1, pieces), d, dtype=torch.float32 if pieces > 1 else dtype, device=rows.device)
        if n == 0 or d == 0:
            return out.zero_()[0]
        kernels.latent_rows_column_kernel[(pieces, triton.cdiv(d, tile["BLOCK_D"]))](
            weights, rows, out, n, d, rows.stride(0), RUN=run, **tile, num_warps=4
        )
        if pieces == 1:
            return out[0]
        weights, rows, n = None, out, pieces
        run, tile = 1024, {"BLOCK_E": 128, "BLOCK_D": 32}  # what is left is little: few launches, many programs


def packed_index(index: LatentIndex) -> LatentIndex:
    """Return an index whose lists are packed."""
    entries, latents, offsets, tokens = packed(index.entries, index.latents, index.offsets, index.tokens)
    return LatentIndex(entries, latents, offsets, index.k, tokens)

"""Triton kernels for the variance of columns: means and squared deviations of pieces, then of all.

Squares are only ever taken of deviations from a mean nearby, so a large common offset costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def variance_pieces_kernel(
    x_ptr,  # [B, d]
    means_ptr,  # [pieces, d]
    squares_ptr,  # [pieces, d] squared deviations from them
    B,
    d,
    row_stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and squared deviations of ROWS tokens, for some columns."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < B)[:, None] & (column < d)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(ROWS, B - tl.program_id(0) * ROWS).to(tl.float32)
    deviation = tl.where(there, x - mean[None, :], 0.0)
    at = tl.program_id(0).to(tl.int64) * d + column
    tl.store(means_ptr + at, mean, mask=column < d)
    tl.store(squares_ptr + at, tl.sum(deviation * deviation, axis=0), mask=column < d)


@triton.jit
def variance_total_kernel(
    means_ptr,  # [pieces, d]
    squares_ptr,  # [pieces, d]
    out_ptr,  # [programs]
    B,
    d,
    pieces,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared deviations of some columns from the mean over all pieces, summed."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        there = (piece < pieces)[:, None] & (column < d)[None, :]
        count = tl.maximum(tl.minimum(ROWS, B - piece * ROWS), 0).to(tl.float32)
        means = tl.load(means_ptr + piece.to(tl.int64)[:, None] * d + column[None, :], mask=there, other=0.0)
        mean += tl.sum(means * (count / B)[:, None], axis=0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        there = (piece < pieces)[:, None] & (column < d)[None, :]
        count = tl.maximum(tl.minimum(ROWS, B - piece * ROWS), 0).to(tl.float32)
        at = piece.to(tl.int64)[:, None] * d + column[None, :]
        off = tl.where(there, tl.load(means_ptr + at, mask=there, other=0.0) - mean[None, :], 0.0)
        squares = tl.load(squares_ptr + at, mask=there, other=0.0)
        total += tl.sum(squares + off * off * count[:, None], axis=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))

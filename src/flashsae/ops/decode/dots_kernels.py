"""Triton kernels of the dot products of each token's row with those of its latents, some columns of all at a time.

Rows of W are asked for by many tokens, at random. Whole, they do not fit into the cache; what all tokens need of a few
columns does, so it comes from memory once. Programs start in the order of their numbers, the first of the grid fastest:
slices of columns are its last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.decode.kernels import _entries_of


@triton.jit
def decode_dots_kernel(
    rows_ptr,  # [B, d]
    indices_ptr,  # [B, k] or [capacity]
    starts_ptr,  # [B + 1] or None
    counts_ptr,  # [B] int32: only so many of the k are wanted, above k none; or None
    W_ptr,  # [d_sae, d]
    parts_ptr,  # [slices, as indices_ptr]
    k, d, row_stride, W_stride, part_stride,
    first_column,  # of the first slice
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts[s, b, j] = rows[b] · W[indices[b, j]] over the columns of slice s, accumulated in float32.

    The second dimension of the grid cuts the list of a token: of lists that ascend, latents that lie together are read
    at about the same time.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    if starts_ptr is None:
        first, count = row * k, k
        if counts_ptr is not None:
            count = tl.load(counts_ptr + row)
            count = tl.where(count > k, 0, count)
    else:
        first, count = _entries_of(starts_ptr, row, k)
    column = first_column + part.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    values = tl.load(rows_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    parts_ptr += part * part_stride + first
    length = tl.cdiv(count, tl.num_programs(1) * BLOCK_K) * BLOCK_K
    begin = tl.program_id(1) * length
    for start in range(begin, tl.minimum(begin + length, count), BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        wanted = slot < count
        latents = tl.load(indices_ptr + first + slot, mask=wanted, other=0).to(tl.int64)
        W = tl.load(
            W_ptr + latents[:, None] * W_stride + column[None, :], mask=wanted[:, None] & inside[None, :], other=0.0
        )
        tl.store(parts_ptr + slot, tl.sum(W.to(tl.float32) * values[None, :], axis=1), mask=wanted)


@triton.jit
def decode_dots_join_kernel(
    parts_ptr,  # [slices, n]
    starts_ptr, counts_ptr,  # as in decode_dots_kernel
    dots_ptr,  # [n]
    B, k, n, slices,
    before,  # slices that dots holds already
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what slices gave, in their order. Places that are not used are left as they are."""
    place = tl.program_id(0).to(tl.int64)
    if counts_ptr is not None:
        blocks = tl.cdiv(k, BLOCK)
        row = place // blocks
        slot = (place - row * blocks) * BLOCK + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + row)
        wanted = (slot < count) & (count <= k)
        slot += row * k
    else:
        slot = place * BLOCK + tl.arange(0, BLOCK)
        wanted = slot < n
        if starts_ptr is not None:
            wanted = slot < tl.load(starts_ptr + B)
    total = tl.load(dots_ptr + slot, mask=wanted & (before > 0), other=0.0)
    for _ in tl.range(0, slices, loop_unroll_factor=8):
        total += tl.load(parts_ptr + slot, mask=wanted, other=0.0)
        parts_ptr += n
    tl.store(dots_ptr + slot, total, mask=wanted)

"""Triton kernels for segment sums: for each latent the weighted sum of the rows of the tokens that use it.

Segment sums are two launches. `partial` sums the pieces of long runs, RUN entries of the index at a time; `sum` gives
every latent its row: a short run is summed directly, a long one from its pieces, in order. `column` sums all rows,
level by level. No atomics, so two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_entries(
    low, high, entries_ptr, tokens_ptr, coeffs_ptr, rows_ptr, k, row_stride, column, inside, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum coeffs · rows over entries of the index; k tells their tokens, or tokens_ptr if there is one."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_E):
        at = start + tl.arange(0, BLOCK_E)
        entry = tl.load(entries_ptr + at, mask=at < high, other=0)
        coeff = tl.load(coeffs_ptr + entry, mask=at < high, other=0.0).to(tl.float32)
        if tokens_ptr is None:
            token = (entry // k).to(tl.int64)
        else:
            token = tl.load(tokens_ptr + at, mask=at < high, other=0).to(tl.int64)
        rows = tl.load(
            rows_ptr + token[:, None] * row_stride + column[None, :],
            mask=(at < high)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_last",  # other latents need them too
        )
        total += tl.sum(coeff[:, None] * rows.to(tl.float32), axis=0)
    return total


@triton.jit
def latent_rows_partial_kernel(
    entries_ptr,  # [nnz]
    tokens_ptr,  # [nnz] token of each, or None where k tells
    latents_ptr,  # [nnz] sorted
    offsets_ptr,  # [d_sae + 1]
    coeffs_ptr,  # [nnz] by entry
    rows_ptr,  # [B, d]
    partial_ptr,  # [pieces, 2, d]: of the run that a piece begins in, and of the one that it ends in
    nnz,
    d_sae,  # None where every place of the code is used
    k,  # None with tokens_ptr
    d,
    row_stride,
    RUN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum each RUN entries of the index, as far as they belong to runs longer than RUN."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    begin = piece * RUN
    end = tl.minimum(begin + RUN, nnz)
    first = tl.load(latents_ptr + begin)
    last = tl.load(latents_ptr + end - 1)
    if d_sae is not None:
        # Places that are not used stand behind all others, as latent d_sae. Of the latent before it nothing is summed
        # in a piece that its run does not reach.
        first, last = tl.minimum(first, d_sae - 1), tl.minimum(last, d_sae - 1)
    out = (piece * 2).to(tl.int64)
    low = tl.load(offsets_ptr + first).to(tl.int32)
    high = tl.load(offsets_ptr + first + 1).to(tl.int32)
    if high - low > RUN:
        total = _sum_entries(
            tl.maximum(low, begin), tl.minimum(high, end), entries_ptr, tokens_ptr, coeffs_ptr, rows_ptr, k, row_stride,
            column, inside, BLOCK_E, BLOCK_D,
        )  # fmt: skip
        tl.store(partial_ptr + out * d + column, total, mask=inside)
    if last != first:
        low = tl.load(offsets_ptr + last).to(tl.int32)
        high = tl.load(offsets_ptr + last + 1).to(tl.int32)
        if high - low > RUN:
            total = _sum_entries(
                low, end, entries_ptr, tokens_ptr, coeffs_ptr, rows_ptr, k, row_stride, column, inside, BLOCK_E, BLOCK_D
            )
            tl.store(partial_ptr + (out + 1) * d + column, total, mask=inside)


@triton.jit
def sum_run(
    latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, k, d, row_stride,
    column, inside, RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return some columns of the sum of a latent's run."""
    low = tl.load(offsets_ptr + latent).to(tl.int32)
    high = tl.load(offsets_ptr + latent + 1).to(tl.int32)
    if high - low <= RUN:
        total = _sum_entries(
            low, high, entries_ptr, tokens_ptr, coeffs_ptr, rows_ptr, k, row_stride, column, inside, BLOCK_E, BLOCK_D
        )
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        begin, end = low // RUN, (high + RUN - 1) // RUN
        # the second slot of a piece belongs to a run that begins in it behind another one
        behind = (tl.load(latents_ptr + begin * RUN) != latent).to(tl.int32)
        for start in range(0, end - begin, BLOCK_E):
            piece = begin + start + tl.arange(0, BLOCK_E)
            slot = (piece * 2 + tl.where(piece == begin, behind, 0)).to(tl.int64)
            total += tl.sum(
                tl.load(
                    partial_ptr + slot[:, None] * d + column[None, :],
                    mask=(piece < end)[:, None] & inside[None, :],
                    other=0.0,
                ),
                axis=0,
            )
    return total


@triton.jit
def latent_rows_sum_kernel(
    entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr,
    out_ptr,  # [d_sae, d]
    d_sae, k, d, row_stride,
    RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give every latent the sum of its run."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    first = tl.program_id(0) * BLOCK_N
    for step in range(0, tl.minimum(BLOCK_N, d_sae - first)):
        latent = first + step
        total = sum_run(
            latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, k, d,
            row_stride, column, inside, RUN, BLOCK_E, BLOCK_D,
        )  # fmt: skip
        # streamed: the result must not push the gathered rows out of the cache
        out = out_ptr + latent.to(tl.int64) * d + column
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def latent_sums_partial_kernel(
    entries_ptr, latents_ptr, offsets_ptr, coeffs_ptr,
    weights_ptr,  # [pieces, 2]
    nnz,
    RUN: tl.constexpr,
):  # fmt: skip
    """Do as `latent_rows_partial_kernel` with coefficients alone, for runs of any length."""
    piece = tl.program_id(0)
    at = piece * RUN + tl.arange(0, RUN)
    last_at = tl.minimum(piece * RUN + RUN, nnz) - 1
    latent = tl.load(latents_ptr + at, mask=at < nnz, other=-1)
    coeff = tl.load(coeffs_ptr + tl.load(entries_ptr + at, mask=at < nnz, other=0), mask=at < nnz, other=0.0)
    coeff = coeff.to(tl.float32)
    first, last = tl.load(latents_ptr + piece * RUN), tl.load(latents_ptr + last_at)
    tl.store(weights_ptr + piece * 2, tl.sum(tl.where(latent == first, coeff, 0.0)))
    tl.store(weights_ptr + piece * 2 + 1, tl.sum(tl.where(latent == last, coeff, 0.0)))


@triton.jit
def latent_sums_kernel(
    entries_ptr, latents_ptr, offsets_ptr, coeffs_ptr, weights_ptr,
    sums_ptr,  # [d_sae]
    d_sae,
    RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sum of the coefficients of BLOCK_N latents at once: short runs directly, long ones from their pieces."""
    latent = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = latent < d_sae
    low = tl.load(offsets_ptr + latent, mask=there, other=0)
    high = tl.load(offsets_ptr + latent + 1, mask=there, other=0)
    is_long = high - low > RUN
    end = tl.where(is_long, low, high)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tl.max(end - low), BLOCK_E):
        at = low[:, None] + start + tl.arange(0, BLOCK_E)[None, :]
        inside = at < end[:, None]
        entry = tl.load(entries_ptr + at, mask=inside, other=0)
        sums += tl.sum(tl.load(coeffs_ptr + entry, mask=inside, other=0.0).to(tl.float32), axis=1)
    begin = low // RUN
    pieces = tl.where(is_long, (high + RUN - 1) // RUN - begin, 0)
    # the second slot of a piece belongs to a run that begins in it behind another one
    behind = (tl.load(latents_ptr + begin * RUN, mask=is_long, other=0) != latent).to(tl.int32)
    for step in range(0, tl.max(pieces)):
        slot = (begin + step) * 2 + tl.where(step == 0, behind, 0)
        sums += tl.load(weights_ptr + slot, mask=step < pieces, other=0.0)
    tl.store(sums_ptr + latent, sums, mask=there)


@triton.jit
def latent_rows_column_kernel(
    coeffs_ptr,  # [n] or None
    rows_ptr,  # [n, d]
    out_ptr,  # [pieces, d]
    n,
    d,
    row_stride,
    RUN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[i] = Σ over RUN rows of coeffs · rows: one level of a tree that sums all rows."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    begin = tl.program_id(0) * RUN
    totals = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(begin, tl.minimum(begin + RUN, n), BLOCK_E):
        row = start + tl.arange(0, BLOCK_E)
        there = row < tl.minimum(begin + RUN, n)
        values = tl.load(
            rows_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if coeffs_ptr is not None:
            values *= tl.load(coeffs_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
        totals += values
    out = out_ptr + tl.program_id(0).to(tl.int64) * d + column
    tl.store(out, tl.sum(totals, axis=0).to(out_ptr.dtype.element_ty), mask=inside)

"""The Triton kernel that decodes nested reconstructions, compares them and differentiates, all levels in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_levels_kernel(
    acts_ptr,  # [capacity]
    indices_ptr,  # [capacity]
    rows_ptr,  # [capacity] int32: token · L + level of each entry, ascending
    starts_ptr,  # [B · L + 1] int32: row i owns the entries starts[i] to starts[i + 1]
    W_ptr,  # [d_sae, d]
    bias_ptr,  # [d] or None
    target_ptr,  # [B, d]
    weights_ptr,  # [B] or None
    before_ptr,  # [L + 1] float64: sum of the weights of the levels before each
    x_hat_ptr, residual_ptr,  # [B, d]: of all latents
    total_ptr,  # [B, d] float32: Σ over levels of weight · residual
    sums_ptr,  # [B · L, d] the same over a level and those behind it; 0 in rows without entries, which nobody reads
    errors_ptr,  # [chunks, B · L]: of each chunk of columns
    grad_acts_ptr,  # [chunks, capacity]: of each
    capacity, L, d, W_stride, target_stride,
    FIRST_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Do for a token and some columns what `decode_loss_kernel` does, for each of L nested reconstructions.

    A first walk over the entries gives the reconstruction of all. A second one, from the last entry to the first, takes
    entries away again: behind each stands what is missing without those that follow, and the sum of the weighted
    residuals of the levels that hold the entry, by which it and its decoder row are to be differentiated. Entries
    before the end of a level have weight 0, so the work does not depend on how many levels there are.
    """
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = token * L
    first, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + L)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < d
    x_hat = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(first, end, FIRST_K, num_stages=STAGES):
        slot = start + tl.arange(0, FIRST_K)
        acts = tl.load(acts_ptr + slot, mask=slot < end, other=0.0).to(tl.float32)
        W = _rows_at(indices_ptr, W_ptr, slot, slot < end, column, inside, W_stride)
        x_hat += tl.sum(acts[:, None] * W, axis=0)
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(target_ptr + token * target_stride + column, mask=inside, other=0.0).to(tl.float32) - x_hat
    tl.store(x_hat_ptr + token * d + column, x_hat.to(x_hat_ptr.dtype.element_ty), mask=inside)
    tl.store(residual_ptr + token * d + column, residual.to(residual_ptr.dtype.element_ty), mask=inside)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token).to(tl.float32)
    errors_row = errors_ptr + chunk * tl.num_programs(0) * L
    grad_row = grad_acts_ptr + chunk * capacity
    total = tl.zeros([CHUNK], tl.float32)
    for back in tl.range(0, end - first, BLOCK_K, num_stages=STAGES):
        slot = end - 1 - back - tl.arange(0, BLOCK_K)
        there = slot >= first
        acts = tl.load(acts_ptr + slot, mask=there, other=0.0).to(tl.float32)
        W = _rows_at(indices_ptr, W_ptr, slot, there, column, inside, W_stride)
        own = tl.load(rows_ptr + slot, mask=there, other=0)
        following = tl.load(rows_ptr + slot + 1, mask=there & (slot + 1 < end), other=0)
        following = tl.where(slot + 1 < end, following, (row + L).to(tl.int32))
        span = tl.where(there, following - own, 0)  # levels that end behind this entry
        ahead = tl.load(before_ptr + (following - row), mask=there, other=0.0)
        ahead -= tl.load(before_ptr + (own - row), mask=there, other=0.0)
        part = acts[:, None] * W
        missing = residual[None, :] + (tl.cumsum(part, axis=0) - part)
        weighted = ahead.to(tl.float32)[:, None] * missing
        sums = total[None, :] + tl.cumsum(weighted, axis=0)
        tl.store(grad_row + slot, -2.0 * weight * tl.sum(W * sums, axis=1), mask=there)
        error = weight * tl.sum(missing * missing, axis=1)
        for level in range(0, tl.max(span)):
            tl.store(errors_row + own + level, error, mask=level < span)
        is_first = there & (slot == tl.load(starts_ptr + own, mask=there, other=-1))
        at = sums_ptr + own.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(at, sums.to(sums_ptr.dtype.element_ty), mask=is_first[:, None] & inside[None, :])
        nothing = tl.zeros([BLOCK_K, CHUNK], sums_ptr.dtype.element_ty)
        for level in range(1, tl.max(span)):
            tl.store(at + level * d, nothing, mask=(level < span)[:, None] & inside[None, :])
        residual += tl.sum(part, axis=0)
        total += tl.sum(weighted, axis=0)
    # levels that end before the first entry
    empty = L
    if end > first:
        empty = (tl.load(rows_ptr + first) - row).to(tl.int32)
    total += (tl.load(before_ptr + empty) - tl.load(before_ptr)).to(tl.float32) * residual
    error = weight * tl.sum(residual * residual)
    for level in range(0, empty):
        tl.store(errors_row + row + level, error)
        nothing = tl.zeros([CHUNK], sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + (row + level) * d + column, nothing, mask=inside)
    tl.store(total_ptr + token * d + column, total, mask=inside)


@triton.jit
def _rows_at(indices_ptr, W_ptr, slot, there, column, inside, W_stride):
    """Load some columns of the decoder rows of some entries, 0 for entries that are not there."""
    latents = tl.load(indices_ptr + slot, mask=there, other=0).to(tl.int64)
    W = tl.load(W_ptr + latents[:, None] * W_stride + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    return W.to(tl.float32)

"""Triton kernels that gather the rows of each token: their weighted sum, and their dot products with a vector.

A token has k latents, or as many as starts_ptr says: acts and latents then have no rows, and token t owns the entries
starts[t] to starts[t + 1].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries_of(starts_ptr, row, k):
    """Return the first entry of a token, and how many it has."""
    if starts_ptr is None:
        first = row * k
        count = k
    else:
        low = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - low
        first = low.to(tl.int64)
    return first, count


@triton.jit
def decode_fwd_kernel(
    acts_ptr,  # [B, k] or [capacity]
    indices_ptr,  # as acts_ptr
    starts_ptr,  # [B + 1] or None
    W_ptr,  # [d_sae, d]
    bias_ptr,  # [d] or None
    out_ptr,  # [B, d]
    k,
    d,
    W_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b] = Σ_j acts[b, j] · W[indices[b, j]] + bias, accumulated in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    total = tl.zeros([BLOCK_D], tl.float32)
    first, count = _entries_of(starts_ptr, row, k)
    for start in range(0, count, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        acts = tl.load(acts_ptr + first + slot, mask=slot < count, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + first + slot, mask=slot < count, other=0).to(tl.int64)
        W = tl.load(
            W_ptr + latents[:, None] * W_stride + column[None, :],
            mask=(slot < count)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(acts[:, None] * W.to(tl.float32), axis=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * d + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def decode_loss_kernel(
    acts_ptr,  # [B, k]
    indices_ptr,  # [B, k]
    W_ptr,  # [d_sae, d]
    bias_ptr,  # [d] or None
    target_ptr,  # [B, d]
    weights_ptr,  # [B] or None
    x_hat_ptr,  # [B, d]
    residual_ptr,  # [B, d] target - x_hat
    errors_ptr,  # [B] weighted squared error of each token
    grad_acts_ptr,  # [B, k] its derivative by each activation
    k,
    d,
    W_stride,
    target_stride,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decode a token, compare with its target and differentiate by its activations; each decoder row is read once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    acts = tl.load(acts_ptr + row * k + slot, mask=slot < k, other=0.0).to(tl.float32)
    latents = tl.load(indices_ptr + row * k + slot, mask=slot < k, other=0).to(tl.int64)
    W_rows = W_ptr + latents[:, None] * W_stride
    error = 0.0
    dots = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, d, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < d
        W = tl.load(W_rows + column[None, :], mask=(slot < k)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        target = tl.load(target_ptr + row * target_stride + column, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.sum(acts[:, None] * W, axis=0)
        if bias_ptr is not None:
            x_hat += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        residual = target - x_hat
        error += tl.sum(residual * residual)
        dots += tl.sum(W * residual[None, :], axis=1)
        tl.store(x_hat_ptr + row * d + column, x_hat.to(x_hat_ptr.dtype.element_ty), mask=inside)
        tl.store(residual_ptr + row * d + column, residual.to(residual_ptr.dtype.element_ty), mask=inside)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(errors_ptr + row, weight * error)
    tl.store(grad_acts_ptr + row * k + slot, -2.0 * weight * dots, mask=slot < k)


@triton.jit
def decode_loss_rows_kernel(
    acts_ptr,  # [capacity]
    indices_ptr,  # [capacity]
    starts_ptr,  # [B + 1]
    W_ptr,  # [d_sae, d]
    bias_ptr,  # [d] or None
    target_ptr,  # [B, d]
    weights_ptr,  # [B] or None
    x_hat_ptr, residual_ptr,  # [B, d]
    errors_ptr,  # [chunks, B]: of each chunk of columns
    grad_acts_ptr,  # [chunks, capacity]: of each
    capacity, d, W_stride, target_stride,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BOTH_D: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Do as `decode_loss_kernel` for a chunk of the columns of a token of up to 2 · BLOCK_K latents.

    They are in one tile, or two beside each other, which move along the columns: of a few sizes, so that little of one
    is empty. Chunks make programs short, so that no token is waited for; all tokens of a chunk come before the next,
    so that rows of W are found in the cache.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, count = _entries_of(starts_ptr, row, None)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    target_row, x_hat_row, residual_row = target_ptr + row * target_stride, x_hat_ptr + row * d, residual_ptr + row * d
    acts_row, indices_row, grad_row = acts_ptr + first, indices_ptr + first, grad_acts_ptr + chunk * capacity + first
    begin = (chunk * CHUNK).to(tl.int32)
    end = tl.minimum(begin + CHUNK, d)
    error = 0.0
    if count <= BLOCK_K // 2:
        error = _loss_in_tiles(
            acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight, count,
            begin, end, d, W_stride, BLOCK_K // 2, 0, min(CHUNK, 2 * BLOCK_D), STAGES, FOLD,
        )  # fmt: skip
    elif count <= BLOCK_K:
        error = _loss_in_tiles(
            acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight, count,
            begin, end, d, W_stride, BLOCK_K, 0, BLOCK_D, STAGES, FOLD,
        )  # fmt: skip
    elif count <= BLOCK_K + BLOCK_K // 4:
        error = _loss_in_tiles(
            acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight, count,
            begin, end, d, W_stride, BLOCK_K, BLOCK_K // 4, BOTH_D, STAGES, FOLD,
        )  # fmt: skip
    elif count <= BLOCK_K + BLOCK_K // 2:
        error = _loss_in_tiles(
            acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight, count,
            begin, end, d, W_stride, BLOCK_K, BLOCK_K // 2, BOTH_D, STAGES, FOLD,
        )  # fmt: skip
    elif count <= 2 * BLOCK_K:
        error = _loss_in_tiles(
            acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight, count,
            begin, end, d, W_stride, 2 * BLOCK_K, 0, BLOCK_D // 2, STAGES, FOLD,
        )  # fmt: skip
    if count <= 2 * BLOCK_K:
        tl.store(errors_ptr + chunk * tl.num_programs(0) + row, weight * error)


@triton.jit
def decode_loss_long_kernel(
    acts_ptr, indices_ptr, starts_ptr, W_ptr, bias_ptr, target_ptr, weights_ptr, x_hat_ptr, residual_ptr, errors_ptr,
    grad_acts_ptr,  # all as in decode_loss_rows_kernel
    B, capacity, d, W_stride, target_stride,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
    PIECE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Do as `decode_loss_rows_kernel` for the tokens of more than BLOCK_K latents, which are few.

    Up to twice as many are in tiles, larger ones of more threads; more are gone through in pieces, once for x_hat and
    once for the dot products, and the second reading finds their rows in the cache nearby.
    """
    first_row, chunk = tl.program_id(0).to(tl.int64) * TOKENS, tl.program_id(1).to(tl.int64)
    token = first_row + tl.arange(0, TOKENS)
    lows = tl.load(starts_ptr + token, mask=token < B, other=0)
    if tl.max(tl.load(starts_ptr + token + 1, mask=token < B, other=0) - lows) > BLOCK_K:
        for row in range(first_row, tl.minimum(first_row + TOKENS, B)):
            first, count = _entries_of(starts_ptr, row, None)
            if count > BLOCK_K:
                weight = 1.0
                if weights_ptr is not None:
                    weight = tl.load(weights_ptr + row).to(tl.float32)
                acts_row, indices_row, target_row = (
                    acts_ptr + first,
                    indices_ptr + first,
                    target_ptr + row * target_stride,
                )
                x_hat_row, residual_row = x_hat_ptr + row * d, residual_ptr + row * d
                grad_row, begin = grad_acts_ptr + chunk * capacity + first, (chunk * CHUNK).to(tl.int32)
                end = tl.minimum(begin + CHUNK, d)
                if count <= BLOCK_K + BLOCK_K // 2:
                    error = _loss_in_tiles(
                        acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight,
                        count, begin, end, d, W_stride, BLOCK_K, BLOCK_K // 2, BLOCK_D, STAGES, FOLD,
                    )  # fmt: skip
                elif count <= 2 * BLOCK_K:
                    error = _loss_in_tiles(
                        acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight,
                        count, begin, end, d, W_stride, 2 * BLOCK_K, 0, BLOCK_D, STAGES, FOLD,
                    )  # fmt: skip
                else:
                    error = _loss_in_pieces(
                        acts_row, indices_row, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_row, weight,
                        count, begin, d, W_stride, PIECE, CHUNK, STAGES,
                    )  # fmt: skip
                tl.store(errors_ptr + chunk * B + row, weight * error)


@triton.jit
def _loss_in_tiles(
    acts_ptr, indices_ptr, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_ptr, weight, count, begin, end,
    d, W_stride,
    BLOCK_K: tl.constexpr, MORE_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Return the squared error of a token of at most BLOCK_K + MORE_K latents; their rows are held together."""
    slot, more = tl.arange(0, BLOCK_K), BLOCK_K
    acts = tl.load(acts_ptr + slot, mask=slot < count, other=0.0).to(tl.float32)
    latents = tl.load(indices_ptr + slot, mask=slot < count, other=0).to(tl.int64)
    W_rows = W_ptr + latents[:, None] * W_stride
    dots = tl.zeros([BLOCK_K, BLOCK_D // FOLD], tl.float32)
    if MORE_K:
        more = BLOCK_K + tl.arange(0, MORE_K)
        more_acts = tl.load(acts_ptr + more, mask=more < count, other=0.0).to(tl.float32)
        more_latents = tl.load(indices_ptr + more, mask=more < count, other=0).to(tl.int64)
        more_rows = W_ptr + more_latents[:, None] * W_stride
        more_dots = tl.zeros([MORE_K, BLOCK_D // FOLD], tl.float32)
    error = 0.0
    for start in tl.range(begin, end, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < d
        W = tl.load(W_rows + column[None, :], mask=(slot < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        x_hat = tl.sum(acts[:, None] * W, axis=0)
        if MORE_K:
            W_more = tl.load(more_rows + column[None, :], mask=(more < count)[:, None] & inside[None, :], other=0.0).to(
                tl.float32
            )
            x_hat += tl.sum(more_acts[:, None] * W_more, axis=0)
        residual = _compared(x_hat, bias_ptr, target_row, x_hat_row, residual_row, column, inside)
        error += tl.sum(residual * residual)
        dots += _folded(W * residual[None, :], BLOCK_K, BLOCK_D, FOLD)
        if MORE_K:
            more_dots += _folded(W_more * residual[None, :], MORE_K, BLOCK_D, FOLD)
    tl.store(grad_ptr + slot, -2.0 * weight * tl.sum(dots, axis=1), mask=slot < count)
    if MORE_K:
        tl.store(grad_ptr + more, -2.0 * weight * tl.sum(more_dots, axis=1), mask=more < count)
    return error


@triton.jit
def _folded(products, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, FOLD: tl.constexpr):
    """Add up neighbours, which one thread holds: what is between threads is added up once, in the end."""
    return tl.sum(tl.reshape(products, [BLOCK_K, BLOCK_D // FOLD, FOLD]), axis=2)


@triton.jit
def _loss_in_pieces(
    acts_ptr, indices_ptr, W_ptr, bias_ptr, target_row, x_hat_row, residual_row, grad_ptr, weight, count, begin, d,
    W_stride, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the squared error of a token of any number of latents; what is read again is found in the cache."""
    column = begin + tl.arange(0, CHUNK)
    inside = column < d
    x_hat = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_K)
        acts = tl.load(acts_ptr + slot, mask=slot < count, other=0.0).to(tl.float32)
        W = _rows_of(indices_ptr, W_ptr, slot, count, column, inside, W_stride)
        x_hat += tl.sum(acts[:, None] * W, axis=0)
    residual = _compared(x_hat, bias_ptr, target_row, x_hat_row, residual_row, column, inside)
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_K)
        W = _rows_of(indices_ptr, W_ptr, slot, count, column, inside, W_stride)
        tl.store(grad_ptr + slot, -2.0 * weight * tl.sum(W * residual[None, :], axis=1), mask=slot < count)
    return tl.sum(residual * residual)


@triton.jit
def decode_join_kernel(
    errors_ptr,  # [chunks, B]
    grad_acts_ptr,  # [chunks, capacity]
    starts_ptr,  # [B + 1]
    total_errors_ptr,  # [B]
    total_grad_acts_ptr,  # [capacity]
    B, capacity, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what the chunks of columns gave, in their order; places that are not used get 0."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = slot < tl.load(starts_ptr + B)
    grad_acts, errors = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _ in range(0, chunks):
        grad_acts += tl.load(grad_acts_ptr + slot, mask=used, other=0.0)
        errors += tl.load(errors_ptr + slot, mask=slot < B, other=0.0)
        grad_acts_ptr += capacity
        errors_ptr += B
    tl.store(total_grad_acts_ptr + slot, grad_acts, mask=slot < capacity)
    tl.store(total_errors_ptr + slot, errors, mask=slot < B)


@triton.jit
def _rows_of(indices_ptr, W_ptr, slot, count, column, inside, W_stride):
    """Load some columns of the rows of some latents of a token."""
    latents = tl.load(indices_ptr + slot, mask=slot < count, other=0).to(tl.int64)
    W = tl.load(
        W_ptr + latents[:, None] * W_stride + column[None, :], mask=(slot < count)[:, None] & inside[None, :], other=0.0
    )
    return W.to(tl.float32)


@triton.jit
def _compared(x_hat, bias_ptr, target_row, x_hat_row, residual_row, column, inside):
    """Add the bias to some columns of a reconstruction, write it and what is missing, and return that."""
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(target_row + column, mask=inside, other=0.0).to(tl.float32) - x_hat
    tl.store(x_hat_row + column, x_hat.to(x_hat_row.dtype.element_ty), mask=inside)
    tl.store(residual_row + column, residual.to(residual_row.dtype.element_ty), mask=inside)
    return residual


@triton.jit
def decode_residual_kernel(
    x_hat_ptr,  # [B, d] without the bias, which is added
    bias_ptr,  # [d] or None
    target_ptr,  # [B, d]
    weights_ptr,  # [B] or None
    residual_ptr,  # [B, d]
    errors_ptr,  # [B]
    d,
    target_stride,
    BLOCK_D: tl.constexpr,
):
    """Compare a reconstruction that is there already with its target, as `decode_loss_kernel` does."""
    row = tl.program_id(0).to(tl.int64)
    error = 0.0
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < d
        x_hat = tl.load(x_hat_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x_hat += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_hat_ptr + row * d + column, x_hat.to(x_hat_ptr.dtype.element_ty), mask=inside)
        residual = tl.load(target_ptr + row * target_stride + column, mask=inside, other=0.0).to(tl.float32) - x_hat
        error += tl.sum(residual * residual)
        tl.store(residual_ptr + row * d + column, residual.to(residual_ptr.dtype.element_ty), mask=inside)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(errors_ptr + row, weight * error)

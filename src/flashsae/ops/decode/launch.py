"""Allocate and launch the token-major passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flashsae.ops.decode import dots_kernels, kernels, level_kernels
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import packed, rows_contiguous

LARGEST_FUSED_K = 256
"""Above this the k rows of a token no longer fit in registers, and decode and gradient are two launches."""


def launch_decode(acts: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the reconstruction [B, d_in]."""
    acts, latents, starts, b_dec = packed(acts, pattern.latents, pattern.starts, b_dec)
    W_dec = rows_contiguous(W_dec)
    B, d = pattern.B, W_dec.shape[1]
    x_hat = torch.empty(B, d, dtype=dtype, device=W_dec.device)
    if B:
        block_k = min(32, triton.next_power_of_2(max(1, pattern.width)))
        block_d = min(512, triton.next_power_of_2(d))
        kernels.decode_fwd_kernel[(B, triton.cdiv(d, block_d))](
            acts, latents, starts, W_dec, b_dec, x_hat, pattern.k, d, W_dec.stride(0),
            BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return x_hat


def _tile(block_k: int, W_dec: Tensor) -> tuple[int, int]:
    """Return columns at once and how many tiles are on their way, as measured (LOG.md, decode in stages)."""
    if W_dec.element_size() > 2:
        return max(16, min(64, 8192 // block_k)), 1  # registers, not latency, are what is short
    # Where rows come from memory longer pieces of them pay, where many are found in the cache smaller programs do
    far = W_dec.numel() * W_dec.element_size() > 2**29
    return (128 if block_k <= 32 or (block_k == 64 and far) else 64), 3


CHUNK = 512
"""Columns that a program of codes of varying length does."""


LEVELS_CHUNK = 256
"""Columns that a program of several levels does: rows of its token, read twice, stay in the cache nearby."""


def rows_tile(pattern: Pattern) -> int:
    """Return how many latents of a token a program holds in a whole tile, where their number varies.

    About as many as tokens have on average, or half as many and half again; up to twice as many fit, too.
    """
    mean = max(1, 4 * pattern.width // 3)
    return int(min(128, max(16, triton.next_power_of_2(mean + 1) // 2)))


def launch_decode_loss(
    acts: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor | None, target: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return errors [B], x_hat, residual [B, d_in] and the gradient of acts."""
    acts, latents, starts, b_dec, weights = packed(acts, pattern.latents, pattern.starts, b_dec, token_weights)
    W_dec, target = rows_contiguous(W_dec), rows_contiguous(target)
    B, d, k = pattern.B, W_dec.shape[1], pattern.k
    x_hat = torch.empty(B, d, dtype=W_dec.dtype, device=W_dec.device)
    residual = torch.empty_like(x_hat)
    tensors = W_dec, b_dec, target, weights, x_hat, residual
    strides = W_dec.stride(0), target.stride(0)
    if k is None:
        return _launch_rows(pattern, (acts, latents, starts, *tensors), (d, *strides))
    errors = torch.empty(B, dtype=torch.float32, device=W_dec.device)
    grad_acts = torch.empty(B, k, dtype=torch.float32, device=W_dec.device)
    if B:
        block_k = triton.next_power_of_2(k)
        block_d, stages = _tile(block_k, W_dec)
        block_d = min(triton.next_power_of_2(d), block_d)
        kernels.decode_loss_kernel[(B,)](
            acts, latents, *tensors, errors, grad_acts, k, d, *strides,
            BLOCK_K=block_k, BLOCK_D=block_d, STAGES=stages, num_warps=max(1, block_k * block_d // 4096),
        )  # fmt: skip
    return errors, x_hat, residual, grad_acts


def _launch_rows(
    pattern: Pattern, tensors: tuple[Tensor | None, ...], sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do `launch_decode_loss` for a number of latents that varies, a chunk of columns at a time.

    Args:
        pattern: of the code.
        tensors: as the kernel takes them, up to the residual.
        sizes: d, and the strides of W_dec and the target.
    """
    starts, W_dec, x_hat, residual = tensors[2], tensors[3], *tensors[-2:]
    assert W_dec is not None
    assert x_hat is not None
    assert residual is not None
    B, capacity, device, (d, *_) = pattern.B, pattern.capacity, x_hat.device, sizes
    block_k, chunk = rows_tile(pattern), min(CHUNK, max(16, triton.next_power_of_2(d)))
    chunks = triton.cdiv(d, chunk)
    parts = torch.empty(chunks * (B + capacity), dtype=torch.float32, device=device)
    errors, grad_acts = (torch.empty(n, dtype=torch.float32, device=device) for n in (B, capacity))
    if not B:
        return errors, x_hat, residual, grad_acts.zero_()
    block_d, warps = min(chunk, max(64, 2048 // block_k)), max(1, block_k // 64)
    stages = 3 if W_dec.element_size() <= 2 else 1  # of float32, registers, not latency, are what is short
    kernels.decode_loss_rows_kernel[(B, chunks)](
        *tensors, parts, parts[chunks * B :], capacity, *sizes,
        # what a thread holds of two tiles beside each other has to fit in its registers
        BLOCK_K=block_k, BLOCK_D=block_d, BOTH_D=block_d if block_k * block_d <= 2048 * warps else block_d // 2,
        STAGES=stages, CHUNK=chunk, FOLD=16 // W_dec.element_size(), num_warps=warps,
    )  # fmt: skip
    kernels.decode_loss_long_kernel[(triton.cdiv(B, 4), chunks)](
        *tensors, parts, parts[chunks * B :], B, capacity, *sizes,
        TOKENS=4, BLOCK_K=2 * block_k, BLOCK_D=min(chunk, 128, 4096 // block_k), STAGES=stages, CHUNK=chunk, PIECE=16,
        FOLD=16 // W_dec.element_size(), num_warps=4,
    )  # fmt: skip
    kernels.decode_join_kernel[(triton.cdiv(max(B, capacity), 512),)](
        parts, parts[chunks * B :], starts, errors, grad_acts, B, capacity, chunks, BLOCK=512, num_warps=4
    )
    return errors, x_hat, residual, grad_acts


def launch_decode_levels(
    acts: Tensor, lists: tuple[Tensor, Tensor, Tensor], W_dec: Tensor, b_dec: Tensor | None, target: Tensor,
    token_weights: Tensor | None, level_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return errors [B, L], x_hat, residual, total [B, d_in], sums [B·L, d_in] and the gradient of acts.

    Args:
        lists: latents and row of each entry, and where rows start, as `decode_levels_kernel` reads them.
        level_weights: [L], float64.
    """
    acts, b_dec, target, weights = packed(acts, b_dec, rows_contiguous(target), token_weights)
    lists, W_dec = packed(*lists), rows_contiguous(W_dec)
    B, d, L, device = len(target), W_dec.shape[1], len(level_weights), W_dec.device
    x_hat = torch.empty(B, d, dtype=W_dec.dtype, device=device)
    residual, total = torch.empty_like(x_hat), torch.empty(B, d, dtype=torch.float32, device=device)
    sums = torch.empty(B * L, d, dtype=W_dec.dtype, device=device)
    chunk = min(LEVELS_CHUNK, triton.next_power_of_2(d))
    chunks = triton.cdiv(d, chunk)
    errors = torch.empty(chunks, B, L, dtype=torch.float32, device=device)
    grad_acts = torch.zeros(chunks, *acts.shape, dtype=torch.float32, device=device)  # not every place may be used
    if B:
        before = F.pad(level_weights.cumsum(0), (1, 0))
        level_kernels.decode_levels_kernel[(B, chunks)](
            acts, *lists, W_dec, b_dec, target, weights, before, x_hat, residual, total, sums, errors, grad_acts,
            acts.numel(), L, d, W_dec.stride(0), target.stride(0),
            FIRST_K=8, BLOCK_K=4, CHUNK=chunk, STAGES=1, num_warps=max(1, chunk // 256),
        )  # fmt: skip
    return errors.sum(0), x_hat, residual, total, sums, grad_acts.sum(0)


def launch_residual(
    x_hat: Tensor, b_dec: Tensor | None, target: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return errors [B] and residual [B, d_in] of a reconstruction without its bias, which is added in place."""
    b_dec, weights = packed(b_dec, token_weights)
    target = rows_contiguous(target)
    B, d = x_hat.shape
    residual = torch.empty_like(x_hat)
    errors = torch.empty(B, dtype=torch.float32, device=x_hat.device)
    if B:
        kernels.decode_residual_kernel[(B,)](
            x_hat, b_dec, target, weights, residual, errors, d, target.stride(0),
            BLOCK_D=min(1024, triton.next_power_of_2(d)), num_warps=4,
        )  # fmt: skip
    return errors, residual


PIECE = 256
"""Bytes of a row of W that a program of dot products reads: of so few columns the cache holds what all tokens need."""

PARTS_BYTES = 2**27
"""Bytes of partial dot products at once, at most, unless a single slice of columns has more."""

NEAR, MOST_CUTS = 2**25, 4
"""Bytes that are found in the cache again soon after. Lists of tokens are cut, so often at most, where a slice of W is
larger."""

ENOUGH_PROGRAMS = 4096
"""Programs that keep a GPU busy; lists of tokens are cut where there are fewer."""

JOIN = 128
"""Dot products whose parts a program adds up."""


def launch_dots(
    rows: Tensor, latents: Tensor, W: Tensor, *, starts: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Return rows[b] · W[latents of token b], of the shape of latents, float32.

    With starts, as a pattern has them, what is not used is 0; with counts [B] only the first so many of a row are set,
    and none of a row whose count is above what it has room for.

    How products are summed depends on W alone (d, dtype, alignment): a pair of token and latent has the same bits
    wherever it stands. Four or eight products one after the other, 16 such sums in pairs, and the d / columns slices
    in their order: no product goes through more than d / 64 + 13 roundings of 2**-24, which is less than the
    (d / 128 + 32) · 2**-23 of the product of norms that certified selections reckon with (ops/encode/product.py).
    """
    latents, starts, counts = packed(latents, starts, counts)
    rows, W = rows_contiguous(rows), rows_contiguous(W)
    B, d = rows.shape
    n, k = latents.numel(), latents.shape[1] if starts is None else None
    empty = torch.zeros if k is None else torch.empty
    dots = empty(latents.shape, dtype=torch.float32, device=W.device)
    if not n or not B:
        return dots
    block_k, block_d = 16, min(PIECE // W.element_size(), triton.next_power_of_2(d))
    slices = triton.cdiv(d, block_d)
    at_once = min(slices, max(1, PARTS_BYTES // (4 * n)))
    cuts = min(MOST_CUTS, triton.cdiv(len(W) * PIECE, NEAR))
    cuts = max(cuts, triton.cdiv(ENOUGH_PROGRAMS, B * slices))
    cuts = min(cuts, triton.cdiv(k or triton.cdiv(n, B), block_k))
    join = JOIN if counts is None else 2 * JOIN  # much of a list may be empty
    joins = triton.cdiv(n, join) if counts is None else B * triton.cdiv(latents.shape[1], join)
    parts = dots if slices == 1 else torch.empty(at_once, n, dtype=torch.float32, device=W.device)
    for first in range(0, slices, at_once):
        some = min(at_once, slices - first)
        dots_kernels.decode_dots_kernel[(B, cuts, some)](
            rows, latents, starts, counts, W, parts, k, d, rows.stride(0), W.stride(0), n, first * block_d,
            BLOCK_K=block_k, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
        if slices > 1:
            dots_kernels.decode_dots_join_kernel[(joins,)](
                parts, starts, counts, dots, B, k, n, some, first, BLOCK=join, num_warps=1
            )
    return dots

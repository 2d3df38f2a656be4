"""The way out: a Triton kernel that computes every pre-activation anew, as often as it takes, and keeps none.

It is always launched and leaves at once unless more entries were wanted than the list holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import KEY_NAN, KEY_NONE, _to_key
from flashsae.ops.select.kernels import _count_keys, bound_of, shift_of

HISTOGRAM = tl.constexpr(0)
COUNT = tl.constexpr(1)
WRITE = tl.constexpr(2)


@triton.jit
def select_redo_kernel(
    x_ptr,  # [B, d]
    W_ptr,  # [n, d]
    bias_ptr, scale_ptr,
    state_ptr,  # [4] int64
    used_ptr,
    hist_ptr,  # [BINS + 1] int64: HISTOGRAM adds keys that reach the bound
    counts_ptr,  # [2, B] int64: COUNT sets, WRITE reads them as from select_starts_kernel
    starts_ptr,  # [B + 1]
    latents_ptr,  # [wanted] int32
    values_ptr,  # [wanted] float32
    capacity, B, n, d, x_stride, W_stride,
    MODE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MAGNITUDE: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Do one pass over all pre-activations of some tokens, in float32, or rounded as products in bfloat16 are."""
    if tl.load(used_ptr) > capacity:
        row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        bound, shift = bound_of(state_ptr), shift_of(state_ptr)
        above = tl.zeros([BLOCK_B], tl.int64)
        ties = tl.zeros([BLOCK_B], tl.int64)
        if MODE == WRITE:
            room = tl.load(counts_ptr + B + row, mask=row < B, other=0)
            position = tl.load(starts_ptr + row, mask=row < B, other=0)
        for start in range(0, n, BLOCK_N):
            latents = start + tl.arange(0, BLOCK_N)
            inside = (row < B)[:, None] & (latents < n)[None, :]
            sums = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            for at in range(0, d, BLOCK_D):
                column = at + tl.arange(0, BLOCK_D)
                x = tl.load(
                    x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :],
                    mask=(row < B)[:, None] & (column < d)[None, :],
                    other=0.0,
                ).to(tl.float32)
                W = (
                    tl.load(
                        W_ptr + latents.to(tl.int64)[None, :] * W_stride + column[:, None],
                        mask=(latents < n)[None, :] & (column < d)[:, None],
                        other=0.0,
                    )
                    .to(x_ptr.dtype.element_ty)
                    .to(tl.float32)
                )
                sums = tl.dot(x, W, sums, input_precision="ieee")
            if ROUNDED:
                sums = sums.to(tl.bfloat16).to(tl.float32)
            values = sums + tl.load(bias_ptr + latents, mask=latents < n, other=0.0).to(tl.float32)[None, :]
            scaled = values
            if scale_ptr is not None:
                scaled = values * tl.load(scale_ptr + latents, mask=latents < n, other=0.0).to(tl.float32)[None, :]
            if MAGNITUDE:
                scaled = tl.abs(scaled)
            keys = tl.where(inside, _to_key(scaled, KEY_NAN), KEY_NONE)
            if MODE == HISTOGRAM:
                _count_keys(keys, inside, hist_ptr, bound, shift)
            if MODE == COUNT:
                above += tl.sum((keys > bound).to(tl.int32), axis=1)
                ties += tl.sum((keys == bound).to(tl.int32), axis=1)
            if MODE == WRITE:
                tied = (keys == bound).to(tl.int32)
                chosen = (keys > bound) | ((tied != 0) & (ties[:, None] + tl.cumsum(tied, axis=1) <= room[:, None]))
                place = position[:, None] + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
                tl.store(latents_ptr + place, tl.broadcast_to(latents[None, :], [BLOCK_B, BLOCK_N]), mask=chosen)
                tl.store(values_ptr + place, values, mask=chosen)
                position += tl.sum(chosen.to(tl.int32), axis=1)
                ties += tl.sum(tied, axis=1)
        if MODE == COUNT:
            tl.store(counts_ptr + row, above, mask=row < B)
            tl.store(counts_ptr + B + row, ties, mask=row < B)

"""Triton kernels over the list of entries that reached a bound: their values in float32, and the code they make.

What the list is, and `state`, say `ops.select.kernels`, whose kernels write it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import KEY_NONE, _keys_of
from flashsae.ops.select.kernels import bound_of


@triton.jit
def _dots(tokens, latents, wanted, x_ptr, W_ptr, d, x_stride, W_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return x[tokens] · W[latents] in float32: at most d / BLOCK_D products in a row, then these sums in pairs."""
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    W_rows = W_ptr + latents.to(tl.int64)[:, None] * W_stride
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = wanted[:, None] & (column < d)[None, :]
        x = tl.load(x_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += tl.load(W_rows + column[None, :], mask=inside, other=0.0).to(tl.float32) * x
    return tl.sum(sums, axis=1)


@triton.jit
def select_rescore_kernel(
    x_ptr,  # [B, d]
    W_ptr,  # [n, d]
    bias_ptr, scale_ptr,
    latents_ptr,  # [capacity]
    tokens_ptr,  # [capacity]
    high_ptr,  # [capacity] keys of upper bounds: rescore those that reach the bound; or None: all
    state_ptr,  # [4] int64, or None
    used_ptr,
    keys_ptr,  # [capacity], or None
    values_ptr,  # [capacity]
    capacity, d, x_stride, W_stride,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Compute listed entries in float32; the key of one that cannot be selected is KEY_NONE."""
    used = tl.load(used_ptr)
    count = tl.minimum(used, capacity).to(tl.int32)
    if high_ptr is not None:
        count = tl.where(used > capacity, 0, count)
        low = bound_of(state_ptr)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < count
        wanted = inside
        if high_ptr is not None:
            wanted = inside & (tl.load(high_ptr + slot, mask=inside, other=KEY_NONE) >= low)
        latents = tl.load(latents_ptr + slot, mask=wanted, other=0)
        tokens = tl.load(tokens_ptr + slot, mask=wanted, other=0)
        values = _dots(tokens, latents, wanted, x_ptr, W_ptr, d, x_stride, W_stride, BLOCK, BLOCK_D)
        values += tl.load(bias_ptr + latents, mask=wanted, other=0.0).to(tl.float32)
        tl.store(values_ptr + slot, values, mask=wanted)
        if keys_ptr is not None:
            tl.store(keys_ptr + slot, _keys_of(values, latents, wanted, scale_ptr, MAGNITUDE), mask=inside)


@triton.jit
def select_count_kernel(
    keys_ptr, begins_ptr,  # as from select_append_kernel
    state_ptr,  # [4] int64
    used_ptr,
    counts_ptr,  # [2, B] int64: keys above the bound, keys that equal it
    capacity, B,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the listed entries of a token."""
    if tl.load(used_ptr) <= capacity:
        row = tl.program_id(0)
        bound = bound_of(state_ptr)
        above = 0
        tied = 0
        end = tl.load(begins_ptr + row + 1)
        for start in range(tl.load(begins_ptr + row), end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            keys = tl.load(keys_ptr + slot, mask=slot < end, other=KEY_NONE)
            above += tl.sum((keys > bound).to(tl.int32))
            tied += tl.sum((keys == bound).to(tl.int32))
        tl.store(counts_ptr + row, above.to(tl.int64))
        tl.store(counts_ptr + B + row, tied.to(tl.int64))


@triton.jit
def select_starts_kernel(
    counts_ptr,  # [2, B] int64: from select_count_kernel; the second row becomes how many of the tied are selected
    state_ptr,  # [4] int64
    starts_ptr,  # [B + 1] int32
    B,
    wanted,
    BLOCK: tl.constexpr,
):
    """Give room to the first of those that equal the bound, and say where each token begins."""
    room = wanted - tl.load(state_ptr + 2)
    total = tl.full([], 0, tl.int64)
    earlier = tl.full([], 0, tl.int64)
    for start in range(0, B, BLOCK):
        row = start + tl.arange(0, BLOCK)
        above = tl.load(counts_ptr + row, mask=row < B, other=0)
        tied = tl.load(counts_ptr + B + row, mask=row < B, other=0)
        kept = tl.minimum(tl.maximum(room - earlier - (tl.cumsum(tied) - tied), 0), tied)
        tl.store(counts_ptr + B + row, kept, mask=row < B)
        tl.store(starts_ptr + 1 + row, (total + tl.cumsum(above + kept)).to(tl.int32), mask=row < B)
        total += tl.sum(above + kept)
        earlier += tl.sum(tied)
    tl.store(starts_ptr, 0)


@triton.jit
def select_write_kernel(
    keys_ptr, entry_values_ptr, entry_latents_ptr, begins_ptr,  # as from select_append_kernel
    state_ptr, used_ptr, counts_ptr,
    starts_ptr,  # [B + 1]
    latents_ptr,  # [wanted] int32
    values_ptr,  # [wanted] float32
    capacity, B,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what is selected of a token to its places."""
    if tl.load(used_ptr) <= capacity:
        row = tl.program_id(0)
        bound = bound_of(state_ptr)
        room = tl.load(counts_ptr + B + row).to(tl.int32)
        position = tl.load(starts_ptr + row)
        ties = 0
        end = tl.load(begins_ptr + row + 1)
        for start in range(tl.load(begins_ptr + row), end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            keys = tl.load(keys_ptr + slot, mask=slot < end, other=KEY_NONE)
            tied = (keys == bound).to(tl.int32)
            chosen = (keys > bound) | ((tied != 0) & (ties + tl.cumsum(tied) <= room))
            latents = tl.load(entry_latents_ptr + slot, mask=chosen, other=0)
            values = tl.load(entry_values_ptr + slot, mask=chosen, other=0.0)
            at = position + tl.cumsum(chosen.to(tl.int32)) - 1
            tl.store(latents_ptr + at, latents, mask=chosen)
            tl.store(values_ptr + at, values, mask=chosen)
            position += tl.sum(chosen.to(tl.int32))
            ties += tl.sum(tied)

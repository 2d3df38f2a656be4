"""Triton kernels of certified float32: screen in float16, rescore what could be selected, select.

The bounds that make the screen rigorous are derived in docs/numerics.md#certified-float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import (
    KEY_INF,
    KEY_NAN,
    KEY_NONE,
    _bounds,
    _keys_of,
    _kth_key,
    _kth_key_in_memory,
    _magnitudes,
    _scaled,
    _to_key,
    _write_groups,
    _write_selection,
)
from flashsae.ops.encode.redo_kernels import note_row


@triton.jit
def encode_topk_round_kernel(
    rows_ptr,  # [rows, d] float32
    half_ptr,  # [rows, d] float16: the rows times a power of two each
    facts_ptr,  # [3, n_facts]; this kernel fills columns from `first`
    n_facts,
    d,
    row_stride,
    top_exponent,  # rows are scaled so that the largest entry lies below 2 ** top_exponent
    accumulation,  # relative error of the float16 product and of the float32 one
    IS_TOKEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows in float16 and what is needed to bound the error.

    Facts of a latent: unit (1 / scale), unit·‖rounded row‖, unit·‖rounding error‖.
    Facts of a token: scale, and p, q with |error| <= p · norm of the latent + q · error norm of the latent.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_D)
    values = tl.load(rows_ptr + row * row_stride + offsets, mask=offsets < d, other=0.0)
    largest = tl.max(tl.abs(values))
    finite = tl.sum((tl.abs(values) <= 3.4028234e38).to(tl.int32)) == BLOCK_D
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126  # largest < 2 ** exponent
    shift = tl.minimum(tl.maximum(top_exponent - exponent, -120), 120)
    tiny = 1e-30
    if IS_TOKEN:
        # a token of zeros (one that equals b_dec) has no error: its bounds are its biases
        empty = finite & (largest == 0.0)
        shift = tl.where(empty, 0, shift)
        tiny = tl.where(empty, 0.0, 1e-30)
    scale = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    scaled = values * scale
    half = scaled.to(tl.float16)
    error = scaled - half.to(tl.float32)  # exact: both have the same leading bits
    norm = tl.sqrt(tl.sum(half.to(tl.float32) * half.to(tl.float32))) * 1.0001
    error_norm = tl.sqrt(tl.sum(error * error)) * 1.0001 + tiny
    half = tl.where(finite, half, float("nan"))
    tl.store(half_ptr + row * d + offsets, half, mask=offsets < d)
    if IS_TOKEN:
        tl.store(facts_ptr + row, scale)
        tl.store(facts_ptr + n_facts + row, error_norm + accumulation * (norm + error_norm))
        tl.store(facts_ptr + 2 * n_facts + row, (norm + error_norm) * (1.0 + accumulation))
    else:
        tl.store(facts_ptr + row, unit)
        tl.store(facts_ptr + n_facts + row, norm * unit)
        tl.store(facts_ptr + 2 * n_facts + row, error_norm * unit)


@triton.jit
def _candidate_keys(
    latents, inside, row, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    raw = tl.load(raw_ptr + row * raw_stride + latents, mask=inside, other=0.0).to(tl.float32)
    low, high = _bounds(
        raw,
        tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32),
        tl.load(column_ptr + latents, mask=inside, other=0.0),
        tl.load(column_ptr + n + latents, mask=inside, other=0.0),
        tl.load(column_ptr + 2 * n + latents, mask=inside, other=0.0),
        tl.load(row_ptr + row), tl.load(row_ptr + rows + row), tl.load(row_ptr + 2 * rows + row),
    )  # fmt: skip
    if MAGNITUDE:
        low, high = _magnitudes(low, high)
    if scale_ptr is not None:
        low, high = _scaled(low, high, tl.load(scale_ptr + latents, mask=inside, other=0.0).to(tl.float32))
    low, high = _to_key(low, KEY_NONE + 1), _to_key(high, KEY_NAN)
    return tl.where(inside, low, KEY_NONE), tl.where(inside, high, KEY_NONE)


@triton.jit
def encode_topk_candidates_kernel(
    raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr,  # as in encode_topk_group_max_kernel
    low_ptr,  # [rows, groups]
    high_ptr,  # [rows, groups]
    list_ptr,  # [rows, CAPACITY] scratch
    candidates_ptr,  # [rows, CAPACITY] int32, ascending
    counts_ptr,  # [rows] int32; above CAPACITY: the list is incomplete
    todo_ptr,  # [1 + rows] int32: receives the rows that must be redone
    rows, n, k, groups, raw_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List the latents of each token whose upper bound reaches the k-th largest lower bound."""
    row = tl.program_id(0).to(tl.int64)
    tau, _room = _kth_key_in_memory(low_ptr + row * groups, groups, k, BLOCK_G)
    list_row, candidates_row = list_ptr + row * CAPACITY, candidates_ptr + row * CAPACITY
    # Of latents whose value is known to equal tau the first k are enough, as ties go to the lowest latent. So a
    # token of zeros has no long list.
    n_groups = _write_groups(
        high_ptr + row * groups, low_ptr + row * groups, tau, k, list_row, groups, CAPACITY, BLOCK_G
    )
    tl.debug_barrier()  # the list was written by other threads
    found = 0
    ties = 0
    STEP: tl.constexpr = 1024 // GROUP
    for start in range(0, tl.minimum(n_groups, CAPACITY), STEP):
        slot = start + tl.arange(0, STEP)
        listed = slot < n_groups
        group = tl.load(list_row + slot, mask=listed & (slot < CAPACITY), other=0)
        latents = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [1024])
        inside = tl.reshape(tl.broadcast_to(listed[:, None], [STEP, GROUP]), [1024]) & (latents < n)
        low, high = _candidate_keys(
            latents, inside, row, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride, MAGNITUDE
        )
        tied = inside & (low == tau) & (high == tau)
        chosen = inside & (high >= tau) & ((tied == 0) | (ties + tl.cumsum(tied.to(tl.int32)) <= k))
        ties += tl.sum(tied.to(tl.int32))
        position = found + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(candidates_row + position, latents, mask=chosen & (position < CAPACITY))
        found += tl.sum(chosen.to(tl.int32))
    found = tl.where(n_groups > CAPACITY, CAPACITY + 1, found)
    tl.debug_barrier()
    if found <= CAPACITY:
        # tau came from groups, of which some hold several of the k; among candidates the k-th bound is the true one
        slot = tl.arange(0, CAPACITY)
        inside = slot < found
        latents = tl.load(candidates_row + slot, mask=inside, other=0)
        low, high = _candidate_keys(
            latents, inside, row, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride, MAGNITUDE
        )
        tau = _kth_key(low, k, tau)
        chosen = inside & (high >= tau)
        tl.debug_barrier()  # every candidate is read before the list is written again
        tl.store(candidates_row + tl.cumsum(chosen.to(tl.int32)) - 1, latents, mask=chosen)
        found = tl.sum(chosen.to(tl.int32))
    else:
        note_row(todo_ptr, row)
    tl.store(counts_ptr + row, found)


@triton.jit
def encode_topk_finish_kernel(
    dots_ptr,  # [rows, CAPACITY] float32 x · w of each candidate
    candidates_ptr,  # [rows, CAPACITY]
    counts_ptr,  # [rows]
    bias_ptr, scale_ptr,
    top_acts_ptr,  # [rows, k]
    top_indices_ptr,  # [rows, k]
    todo_ptr,  # as in encode_topk_candidates_kernel
    n, k,
    CAPACITY: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Select among rescored candidates.

    Where the k-th key overflows, latents that bounds told from it by their real size tie with it: such a row is redone.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    if count <= CAPACITY:
        slot = tl.arange(0, CAPACITY)
        inside = slot < count
        latents = tl.load(candidates_ptr + row * CAPACITY + slot, mask=inside, other=0)
        values = tl.load(dots_ptr + row * CAPACITY + slot, mask=inside, other=0.0)
        values += tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
        keys = _keys_of(values, latents, inside, scale_ptr, MAGNITUDE)
        tau = _kth_key(keys, k, tl.min(tl.where(inside, keys, KEY_NAN)))
        _write_selection(keys, latents, values, k, tau, top_acts_ptr + row * k, top_indices_ptr + row * k)
        overflows = (tau == KEY_INF) | (tau == ~KEY_INF)
        if overflows & (count < n):
            note_row(todo_ptr, row)

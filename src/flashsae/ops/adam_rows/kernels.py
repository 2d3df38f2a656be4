"""Triton kernels of the latent pass: a program owns one row of a weight matrix, or some columns of it.

The gradient of the row is summed into registers, used, and forgotten.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.latent_rows.kernels import sum_run


@triton.jit
def _load_weights(weights_ptr, low_ptr, at, inside):
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    if low_ptr is None:
        whole = weights.to(tl.float32)
    else:
        low = tl.load(low_ptr + at, mask=inside, other=0, eviction_policy="evict_first")
        bits = (weights.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)
        whole = bits.to(tl.float32, bitcast=True)
    return whole


@triton.jit
def _store_weights(weights_ptr, low_ptr, at, inside, weights):
    if low_ptr is None:
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")
    else:
        # the bits of some NaNs would round to 0
        bits = tl.where(weights == weights, weights.to(tl.int32, bitcast=True), 0x7FC00000)
        high = (bits + 0x8000) >> 16
        low = bits - (high << 16)
        tl.store(weights_ptr + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside, cache_modifier=".cs")
        tl.store(low_ptr + at, low.to(tl.int16), mask=inside, cache_modifier=".cs")


@triton.jit
def _gradient(
    latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, dense_ptr, slots_ptr,
    k, d, row_stride, column, inside, RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return some columns of the gradient of a row: its sparse part, if there is one, and its dense part."""
    total = tl.zeros([BLOCK_D], tl.float32)
    if entries_ptr is not None:
        total = sum_run(
            latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, k, d,
            row_stride, column, inside, RUN, BLOCK_E, BLOCK_D,
        )  # fmt: skip
    if dense_ptr is not None:
        slot = latent if slots_ptr is None else tl.load(slots_ptr + latent)
        at = slot.to(tl.int64) * d + column
        total += tl.load(dense_ptr + at, mask=inside & (at >= 0), other=0.0).to(tl.float32)
    return total


@triton.jit
def _mixed(bits):
    """Return 32 bits in which each depends on all of the argument (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _round_stochastically(values, noise):
    """Return float32 numbers that bfloat16 holds: up in magnitude with the chance that makes the mean right."""
    bits = (values.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return tl.where(tl.abs(values) < float("inf"), bits.to(tl.float32, bitcast=True), values)


@triton.jit
def adam_rows_kernel(
    weights_ptr,  # [d_sae, d]
    low_ptr,  # [d_sae, d] the 16 low bits of bfloat16 weights, or None
    exp_avg_ptr,  # [d_sae, d]
    exp_avg_sq_ptr,  # [d_sae, d]
    entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr,  # as in `sum_run`, or None
    dense_ptr,  # [C, d] or None
    slots_ptr,  # [d_sae] or None
    lr_ptr,  # [] float
    step_ptr,  # [] float64
    bias_correction_ptr,  # [2] float64: 1 - beta1^step, 1 - beta2^step
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    k, d, row_stride,
    UNIT_NORM: tl.constexpr, DECOUPLED: tl.constexpr, RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of Adam on a row; with UNIT_NORM the program sees the whole row, projects its gradient and scales it."""
    latent = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    at = latent.to(tl.int64) * d + column
    # asked for first: these come while the shorter loads of the gradient wait for each other
    weights = _load_weights(weights_ptr, low_ptr, at, inside)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    gradient = _gradient(
        latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, dense_ptr,
        slots_ptr, k, d, row_stride, column, inside, RUN, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    if UNIT_NORM:
        gradient -= tl.sum(gradient * weights) * weights
    if not DECOUPLED:
        gradient += weight_decay * weights
    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient * gradient
    if DECOUPLED:
        weights *= (1 - tl.load(lr_ptr).to(tl.float64) * weight_decay).to(tl.float32)
    step_size = (tl.load(lr_ptr).to(tl.float64) / tl.load(bias_correction_ptr)).to(tl.float32)
    second = tl.load(bias_correction_ptr + 1).to(tl.float32)
    weights -= step_size * exp_avg / (tl.sqrt(exp_avg_sq / second) + eps)
    if UNIT_NORM:
        norm = tl.sqrt(tl.sum(tl.where(inside, weights * weights, 0.0)))
        weights = weights / tl.maximum(norm, 1e-30)
    _store_weights(weights_ptr, low_ptr, at, inside, weights)
    if exp_avg_ptr.dtype.element_ty == tl.bfloat16:
        bits = _mixed(latent.to(tl.uint32) + tl.load(step_ptr).to(tl.int32).to(tl.uint32) * 0x9E3779B1)
        bits = _mixed(bits + column.to(tl.uint32))
        exp_avg = _round_stochastically(exp_avg, bits & 0xFFFF)
        exp_avg_sq = _round_stochastically(exp_avg_sq, bits >> 16)
    tl.store(exp_avg_ptr + at, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def row_squares_kernel(
    weights_ptr,  # [d_sae, d] or None
    entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, dense_ptr, slots_ptr,
    out_ptr,  # [1 or 3, d_sae, slices]
    d_sae, k, d, row_stride,
    RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Over some columns: Σ g², and with weights also Σ g·w and Σ w². Reads only."""
    latent = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    gradient = _gradient(
        latent, entries_ptr, tokens_ptr, latents_ptr, offsets_ptr, coeffs_ptr, rows_ptr, partial_ptr, dense_ptr,
        slots_ptr, k, d, row_stride, column, inside, RUN, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    out = out_ptr + latent.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    plane = tl.cast(d_sae, tl.int64) * tl.num_programs(1)
    tl.store(out, tl.sum(gradient * gradient))
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + latent.to(tl.int64) * d + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + plane, tl.sum(gradient * weights))
        tl.store(out + 2 * plane, tl.sum(weights * weights))

"""Triton kernels of the 8-bit screen: rows rotated and rounded at random to int8, and their product.

What bounds the error of such a product is proved in docs/numerics.md#the-int8-screen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.adam_rows.kernels import _mixed
from flashsae.ops.encode.kernels import KEY_NAN, _to_key

BLOCK = tl.constexpr(128)
"""Columns that are rotated together."""

LARGEST = tl.constexpr(1e15)
TINY = tl.constexpr(1e-15)
"""Rows whose size lies beyond these, of tokens their largest number, are not rounded: they are 0, with their norm as an
error, or if they are too large without a bound."""

MAGIC = tl.constexpr(12582912.0)
"""1.5 · 2**23: added to a small float32 number, it leaves the nearest integer in the lowest bits."""


@triton.jit
def _hadamard():
    """Return the Hadamard matrix of 128 rows, some of them negated.

    An entry is -1 where the numbers of row and column share odd many bits. Which rows are negated is as good as random,
    so that no plain direction, such as that of ones, becomes a column of its own.
    """
    shared = tl.arange(0, BLOCK)[:, None] & tl.arange(0, BLOCK)[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    shared ^= _mixed(tl.arange(0, BLOCK).to(tl.uint32) + 0x9E3779B1).to(tl.int32)[:, None]
    return 1 - 2 * (shared & 1)


@triton.jit
def _of_lines(values, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return a number of each row for each of its blocks: [ROWS * BLOCKS, 1]."""
    return tl.reshape(tl.broadcast_to(values[:, None], [ROWS, BLOCKS]), [ROWS * BLOCKS])[:, None]


@triton.jit
def _largest(values, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the largest number of each row: by lines first, whose numbers few threads hold."""
    return tl.max(tl.reshape(tl.max(values, axis=1), [ROWS, BLOCKS]), axis=1)


@triton.jit
def _total(values, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.sum(tl.reshape(tl.sum(values, axis=1), [ROWS, BLOCKS]), axis=1)


@triton.jit
def screen_round_kernel(
    rows_ptr,  # [n, d]
    rounded_ptr,  # [n, blocks * 128] int8
    facts_ptr,  # float32: [6, n] of tokens, [3, n] of latents
    noise_ptr,  # [] int64 or None
    n,
    d,
    blocks,
    row_stride,
    first,  # number of the first row in its matrix
    log_chance,
    typical,  # about a squared norm of rounded rows
    slack,  # what float32 arithmetic changes of a product, relative to the norms of both rows
    bias,  # √D times what the 16 bits of the noise change of a mean
    shift,  # products are written in float16 times this power of two
    IS_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,  # what a tensor core rotates: bfloat16, twice for float32 rows
):
    """Rotate rows, and round them to int8, up or down with the chances that make the mean right.

    Facts of a latent: unit / shift, unit, and unit · square, where square is at least the squared norm of the rounded
    row. Facts of a token: unit, p and q: a product is off by at most p + q · square, in the units of both rows; and the
    same once more in a unit that is a power of two, for `_bounds`: its inverse, p and q. Of a row that is not finite
    the last two are NaN.
    """
    hadamard = _hadamard().to(OPERAND)
    line = tl.arange(0, ROWS * BLOCKS)
    block = line % BLOCKS
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # tokens and latents share no noise
    salt = tl.full([], 0x85EBCA77 if IS_TOKEN else 0x27D4EB2F, tl.uint32)
    pair = _mixed((tl.arange(0, BLOCK) >> 1).to(tl.uint32) * 0x9E3779B1 + salt)[None, :]
    noise = tl.full([], 0, tl.int64)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr)
    seed = _mixed(salt + _mixed(noise.to(tl.uint32) + _mixed((noise >> 32).to(tl.uint32))))
    longest = tl.sqrt(blocks * 128.0)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = start + line // BLOCKS
        inside = (row < n)[:, None] & (column < d)
        values = tl.load(rows_ptr + row.to(tl.int64)[:, None] * row_stride + column, mask=inside, other=0.0)
        high = values.to(OPERAND)
        if rows_ptr.dtype.element_ty == OPERAND:
            rotated = tl.dot(high, hadamard, input_precision="ieee")
        else:
            low = (values.to(tl.float32) - high.to(tl.float32)).to(OPERAND)
            rotated = tl.dot(low, hadamard, input_precision="ieee")  # first: little is added to large sums
            rotated = tl.dot(high, hadamard, rotated, input_precision="ieee")
        square = _total(rotated * rotated, ROWS, BLOCKS)
        size = tl.sqrt(square)
        if IS_TOKEN:
            # as integers, sizes are in order, and what is not finite is the largest
            sizes = values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            size = _largest(sizes, ROWS, BLOCKS).to(tl.float32, bitcast=True)
        is_rounded = (size >= TINY) & (size <= LARGEST)
        unit = tl.where(is_rounded, _largest(tl.abs(rotated), ROWS, BLOCKS) * (1.000001 / 127), 1.0)
        scale = tl.where(is_rounded, 1.0 / unit, 0.0)
        # 16 bits each for two neighbours: (r + 1/2) / 65536 - 1/2 is added, and what is nearest taken
        bits = _mixed(_mixed(seed + (first + row).to(tl.uint32) * 0x9E3779B1) + block.to(tl.uint32))[:, None] ^ pair
        bits *= 0x2C1B3C6D
        bits = (bits ^ (bits >> 16)) * 0x297A2D39
        bits ^= bits >> 16
        bits = tl.where((column & 1) == 0, bits << 7, bits >> 9) & 0x7FFF80 | 0x3F800000
        moved = rotated * _of_lines(scale, ROWS, BLOCKS) + bits.to(tl.float32, bitcast=True)
        whole = (moved - (1.5 - 0.5 / 65536)) + MAGIC
        at = row.to(tl.int64)[:, None] * (blocks * BLOCK) + column
        tl.store(
            rounded_ptr + at, whole.to(tl.int32, bitcast=True).to(tl.int8),
            mask=(row < n)[:, None] & (block < blocks)[:, None],
        )  # fmt: skip
        square *= scale * scale * 1.002  # of the scaled row
        place = start + tl.arange(0, ROWS)
        there, to = place < n, facts_ptr + place
        if IS_TOKEN:
            norm, root, empty = tl.sqrt(square), tl.sqrt(typical), size == 0.0
            rate = tl.sqrt(8.0 * log_chance / (typical + square))
            of_norm = slack * norm + bias
            p = rate * square * 0.125 + log_chance / rate + of_norm * (0.5 * root + longest) + bias * norm
            q = rate * 0.125 + of_norm * 0.5 / root
            p, q = tl.where(is_rounded, p * 1.001, longest + 0.5), tl.where(is_rounded, q * 1.001, 0.5)
            p, q = tl.where(empty, 0.0, p), tl.where(empty, 0.0, q)
            bad = (size <= LARGEST) == 0
            p, q = tl.where(bad, float("nan"), p), tl.where(bad, float("nan"), q)
            unit = tl.where(is_rounded, unit, size * longest * 11.33)  # at least the norm of the rotated row
            unit = tl.where(bad, 0.0, unit) * (1.0 / 128)  # the rotation is 128 ** 0.5 times an orthogonal one
            exponent = tl.maximum((unit.to(tl.int32, bitcast=True) >> 23) & 0xFF, 8)
            power = tl.where(unit > 0.0, ((254 - exponent) << 23).to(tl.float32, bitcast=True), 1.0)
            tl.store(to, unit, mask=there)
            tl.store(to + n, p, mask=there)
            tl.store(to + 2 * n, q, mask=there)
            tl.store(to + 3 * n, power, mask=there)
            tl.store(to + 4 * n, p * (unit * power), mask=there)
            tl.store(to + 5 * n, q * (unit * power), mask=there)
        else:
            norm = tl.where(is_rounded, tl.sqrt(square) + longest, 0.0)  # at least that of the rounded row
            # squares below 1e-38 may be missing in the size of a row that is not rounded
            unit = tl.where(is_rounded, unit, size * 1.01 + tl.where(size < TINY, 1e-14, 0.0))
            bad = (size <= LARGEST) == 0
            unit = tl.where(bad, float("nan"), unit)
            tl.store(to, unit / shift, mask=there)
            tl.store(to + n, unit, mask=there)
            tl.store(to + 2 * n, unit * (norm * norm), mask=there)


@triton.jit
def _nearest(values):
    """Return bits of which the upper 16 are the nearest bfloat16: the same on a GPU as in the interpreter."""
    return values.to(tl.int32, bitcast=True) + 0x8000


@triton.jit
def screen_product_kernel(
    x_desc,  # [rows, D] int8
    W_desc,  # [n, D] int8
    out_desc,  # [rows, n]: bits of bfloat16 centres of keys, or float16 products
    maxima_ptr,  # [rows, maxima_stride] int32, or None: products are wanted
    tokens_ptr,  # [6, tokens] facts, from those of the first of these rows on
    latents_ptr,  # [3, n] facts
    bias_ptr,  # [n]
    scale_ptr,  # [n] or None
    rows,
    n,
    D,
    tokens,
    maxima_stride,
    shift,
    MAGNITUDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply rounded rows, and write the products, or what keys are about and the largest of that in each group.

    The one pass over all pre-activations. NaN is written as infinity.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    per_band = 16 * tl.cdiv(n, BLOCK_N)  # 16 tiles of tokens stay in the cache while weights go by
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
        band = tile // per_band * 16
        height = tl.minimum(tiles_m - band, 16)
        m = (band + tile % per_band % height) * BLOCK_M
        at = tile % per_band // height * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            sums = tl.dot(x_desc.load([m, k]), W_desc.load([at, k]).T, sums, out_dtype=tl.int32)
        row = m + tl.arange(0, BLOCK_M)
        unit = tl.load(tokens_ptr + row, mask=row < rows, other=0.0)[:, None]
        if maxima_ptr is None:
            power = tl.load(tokens_ptr + 3 * tokens + row, mask=row < rows, other=1.0)[:, None]
            out_desc.store([m, at], (sums.to(tl.float32) * (unit * power * shift)).to(tl.float16))
        else:
            latent = at + tl.arange(0, BLOCK_N)
            there = latent < n
            latent_unit = tl.load(latents_ptr + latent, mask=there, other=0.0)[None, :]
            bias = tl.load(bias_ptr + latent, mask=there, other=float("-inf")).to(tl.float32)[None, :]
            # not even a token of zeros tells what a row that is not finite gives
            bad = latent_unit != latent_unit
            latent_unit = tl.where(bad, 0.0, latent_unit)
            bias = tl.where((bias != bias) | bad, float("inf"), bias)
            centres = sums.to(tl.float32) * latent_unit * (unit * shift) + bias
            if MAGNITUDE:
                centres = tl.where(there[None, :], tl.abs(centres), float("-inf"))
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + latent, mask=there, other=1.0).to(tl.float32)[None, :]
                centres *= scale
                centres = tl.where(centres != centres, float("inf"), centres)
            out_desc.store([m, at], (_nearest(centres) >> 16).to(tl.int16))
            largest = tl.max(tl.reshape(centres, [BLOCK_M, BLOCK_N // GROUP, GROUP]), axis=2)
            group = at // GROUP + tl.arange(0, BLOCK_N // GROUP)
            inside = (row < rows)[:, None] & (group < tl.cdiv(n, GROUP))[None, :]
            place = row.to(tl.int64)[:, None] * maxima_stride + group[None, :]
            # the largest of rounded numbers is the largest one, rounded
            largest = (_nearest(largest) & -65536).to(tl.float32, bitcast=True)
            tl.store(maxima_ptr + place, _to_key(largest, KEY_NAN), mask=inside)

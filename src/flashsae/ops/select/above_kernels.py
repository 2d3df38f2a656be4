"""Triton kernels that select all pre-activations above a threshold: a bit for each, then places, then what is written.

Bit j of word i of a token is latent 32·i + j. A chunk is some consecutive words, a program's share of a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import _bounds, _pre_acts
from flashsae.ops.select.kernels import _lower, _upper
from flashsae.ops.select.list_kernels import _dots

BITS = tl.constexpr(32)
TILE_WORDS = tl.constexpr(32)
TILE = tl.constexpr(1024)


@triton.jit
def _word(chosen):
    return tl.sum(chosen.to(tl.int32) << tl.arange(0, BITS)[None, :], axis=1)


@triton.jit
def _exceeds(values, threshold_ptr, threshold_stride, latents, inside):
    """Tell which values exceed their threshold; NaN does."""
    threshold = tl.load(threshold_ptr + latents * threshold_stride, mask=inside, other=0.0)
    return inside & ((values <= threshold) == 0)


@triton.jit
def select_above_kernel(
    raw_ptr, bias_ptr, column_ptr, row_ptr,  # as in encode_topk_group_max_kernel
    threshold_ptr,  # [n] float32, or [1]
    threshold_stride,  # 1, or 0
    words_ptr,  # [rows, words]; certified: those that may exceed it
    sure_ptr,  # [rows, words]: those that certainly do; or None
    counts_ptr,  # [rows, chunks], of zeros: how many do, certified: certainly
    rows, n, words, chunks, raw_stride,
    CHUNK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compare every pre-activation with its threshold: the one pass over all of them."""
    word = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    latents = word[:, None] * BITS + tl.arange(0, BITS)[None, :]
    inside = latents < n
    bias = tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + latents * threshold_stride, mask=inside, other=0.0)
    if column_ptr is not None:
        unit = tl.load(column_ptr + latents, mask=inside, other=0.0)
        norm = tl.load(column_ptr + n + latents, mask=inside, other=0.0)
        error_norm = tl.load(column_ptr + 2 * n + latents, mask=inside, other=0.0)
    chunk = tl.program_id(0) * BLOCK_G // CHUNK
    first = tl.program_id(1).to(tl.int64) * BLOCK_B
    for step in tl.range(0, tl.minimum(BLOCK_B, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + step
        raw = tl.load(raw_ptr + row * raw_stride + latents, mask=inside, other=0.0).to(tl.float32)
        if column_ptr is not None:
            token_unit = tl.load(row_ptr + row)
            low, high = _bounds(
                raw, bias, unit, norm, error_norm,
                token_unit, tl.load(row_ptr + rows + row), tl.load(row_ptr + 2 * rows + row),
            )  # fmt: skip
            chosen = inside & (_lower(low, token_unit) > threshold)
            tl.store(sure_ptr + row * words + word, _word(chosen), mask=word < words)
            maybe = inside & ((_upper(high, token_unit) <= threshold) == 0)
            tl.store(words_ptr + row * words + word, _word(maybe), mask=word < words)
        else:
            chosen = inside & ((raw + bias <= threshold) == 0)
            tl.store(words_ptr + row * words + word, _word(chosen), mask=word < words)
        count = tl.sum(chosen.to(tl.int32))
        if count > 0:
            tl.atomic_add(counts_ptr + row * chunks + chunk, count, sem="relaxed")


@triton.jit
def _list_words(words, word, list_ptr):
    """List the words that are not 0; return how many."""
    present = (words != 0).to(tl.int32)
    tl.store(list_ptr + tl.cumsum(present) - 1, word, mask=present != 0)
    tl.debug_barrier()  # other threads read the list
    return tl.sum(present)


@triton.jit
def _positions(bits):
    """Return the place of each bit among those that are set, and how many are."""
    counts = tl.sum(bits, axis=1)
    return (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(bits, axis=1) - 1, tl.sum(counts)


@triton.jit
def select_decide_kernel(
    x_ptr,  # [rows, d] float32
    W_ptr,  # [n, d] float32
    bias_ptr, threshold_ptr, threshold_stride,
    words_ptr,  # [rows, words]: those that may exceed the threshold; becomes those that do
    sure_ptr,  # [rows, words]
    list_ptr,  # [rows, words] scratch
    open_ptr,  # [rows, chunks, TILE] scratch
    counts_ptr,  # [rows, chunks]: grows
    words, chunks, d, x_stride, W_stride,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute what the bounds leave open in float32; nothing is too much, it only takes longer."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    word = chunk * CHUNK + tl.arange(0, CHUNK)
    words_row, sure_row = words_ptr + row * words, sure_ptr + row * words
    maybe = tl.load(words_row + word, mask=word < words, other=0)
    sure = tl.load(sure_row + word, mask=word < words, other=0)
    list_row = list_ptr + row * words + chunk * CHUNK
    open_row = open_ptr + (row * chunks + chunk) * TILE
    listed = _list_words(maybe & ~sure, word, list_row)
    added = 0
    for start in range(0, listed, TILE_WORDS):
        slot = start + tl.arange(0, TILE_WORDS)
        at = tl.load(list_row + slot, mask=slot < listed, other=0)
        certain = tl.load(sure_row + at, mask=slot < listed, other=0)
        left = tl.load(words_row + at, mask=slot < listed, other=0) & ~certain
        bit = tl.arange(0, BITS)[None, :]
        bits = (left[:, None] >> bit) & 1
        position, count = _positions(bits)
        tl.store(open_row + position, at[:, None] * BITS + bit, mask=bits != 0)
        tl.debug_barrier()  # other threads read it
        for begin in range(0, count, 16):
            entry = begin + tl.arange(0, 16)
            wanted = entry < count
            latents = tl.load(open_row + entry, mask=wanted, other=0)
            values = _dots(
                row + tl.zeros([16], tl.int64), latents, wanted, x_ptr, W_ptr, d, x_stride, W_stride, 16, BLOCK_D
            )
            values += tl.load(bias_ptr + latents, mask=wanted, other=0.0).to(tl.float32)
            exceeds = _exceeds(values, threshold_ptr, threshold_stride, latents, wanted)
            tl.debug_barrier()  # all latents were read
            tl.store(open_row + entry, exceeds.to(tl.int32), mask=wanted)
        tl.debug_barrier()
        decided = tl.load(open_row + position, mask=bits != 0, other=0)
        tl.store(words_row + at, certain | tl.sum(decided << bit, axis=1), mask=slot < listed)
        added += tl.sum(decided)
        tl.debug_barrier()  # scratch is used again
    place = counts_ptr + row * chunks + chunk
    tl.store(place, tl.load(place) + added)


@triton.jit
def select_places_kernel(
    counts_ptr,  # [rows * chunks]
    places_ptr,  # [rows * chunks] int64: where each chunk begins
    total_ptr,  # int64: how many there were before; grows
    starts_ptr,  # [rows + 1] int32: where each token begins
    n,
    chunks,
    capacity,
    BLOCK: tl.constexpr,
):
    """Turn counts into places."""
    total = tl.load(total_ptr)
    for start in range(0, n, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + slot, mask=slot < n, other=0).to(tl.int64)
        places = total + tl.cumsum(counts) - counts
        tl.store(places_ptr + slot, places, mask=slot < n)
        tl.store(
            starts_ptr + slot // chunks,
            tl.minimum(places, capacity).to(tl.int32),
            mask=(slot < n) & (slot % chunks == 0),
        )
        total += tl.sum(counts)
    tl.store(total_ptr, total)
    tl.store(starts_ptr + n // chunks, tl.minimum(total, capacity).to(tl.int32))


@triton.jit
def select_above_write_kernel(
    raw_ptr,  # [rows, raw_stride], or None: values are computed elsewhere
    bias_ptr,
    words_ptr,  # [rows, words]
    list_ptr,  # [rows, words] scratch
    places_ptr,  # [rows, chunks]
    latents_ptr,  # [capacity] int32
    tokens_ptr,  # [capacity] int32, or None
    values_ptr,  # [capacity] float32
    first,  # token of the first row
    base,  # place of the first entry of latents_ptr
    capacity, n, words, chunks, raw_stride,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write what is selected of a chunk to its places, as far as there are any."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    place = tl.load(places_ptr + row * chunks + chunk) - base
    if place < capacity:
        word = chunk * CHUNK + tl.arange(0, CHUNK)
        words_row, list_row = words_ptr + row * words, list_ptr + row * words + chunk * CHUNK
        listed = _list_words(tl.load(words_row + word, mask=word < words, other=0), word, list_row)
        for start in range(0, listed, TILE_WORDS):
            slot = start + tl.arange(0, TILE_WORDS)
            at = tl.load(list_row + slot, mask=slot < listed, other=0)
            bit = tl.arange(0, BITS)[None, :]
            bits = (tl.load(words_row + at, mask=slot < listed, other=0)[:, None] >> bit) & 1
            position, count = _positions(bits)
            latents = at[:, None] * BITS + bit
            position = place + position
            chosen = (bits != 0) & (position < capacity)
            tl.store(latents_ptr + position, latents, mask=chosen)
            if tokens_ptr is not None:
                tokens = tl.zeros([TILE_WORDS, BITS], tl.int32) + (first + row).to(tl.int32)
                tl.store(tokens_ptr + position, tokens, mask=chosen)
            if raw_ptr is not None:
                values = _pre_acts(raw_ptr + row * raw_stride, bias_ptr, latents, chosen)
                tl.store(values_ptr + position, values, mask=chosen)
            place += count

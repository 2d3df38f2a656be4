"""Triton kernels that select from whole rows computed anew: few of them by many programs each, many by one each.

They are always launched and leave at once where there is nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import KEY_NONE, _keys_of, _kth_key_in_memory, _write_chosen, _write_groups


@triton.jit
def note_row(todo_ptr, row):
    """Put a row on the list of those to be done; in which order they stand there changes nothing."""
    tl.store(todo_ptr + 1 + tl.atomic_add(todo_ptr, 1), row)


@triton.jit
def _pieces_of(todo, slots, MOST: tl.constexpr):
    """Return into how many pieces the latents of a row are cut."""
    return tl.minimum(tl.maximum(slots // tl.maximum(todo, 1), 1), MOST)


@triton.jit
def _list_best(keys_row, size, k, list_row, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return the places of the k largest of some keys, the first of equal ones, in order."""
    tau, room = _kth_key_in_memory(keys_row, size, k, BLOCK_G)
    _write_groups(keys_row, None, tau, room, list_row, size, BLOCK_K, BLOCK_G)
    tl.debug_barrier()  # the list was written by other threads
    slot = tl.arange(0, BLOCK_K)
    return tl.load(list_row + slot, mask=slot < k, other=0)


@triton.jit
def _compute(
    x_ptr, W_ptr, bias_ptr, scale_ptr, keys_rows, values_rows, row, start, end, d, x_stride, W_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Write keys and values of some latents of some rows, in float32."""
    for first in range(start, end, BLOCK_N):
        latents = first + tl.arange(0, BLOCK_N)
        inside = latents < end
        sums = tl.zeros([row.shape[0], BLOCK_N, BLOCK_D], tl.float32)
        for at in tl.range(0, d, BLOCK_D, num_stages=STAGES):
            column = at + tl.arange(0, BLOCK_D)
            there = (column < d)[None, :]
            W = tl.load(
                W_ptr + latents.to(tl.int64)[:, None] * W_stride + column[None, :],
                mask=inside[:, None] & there,
                other=0.0,
            )
            x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=there, other=0.0)
            sums += W.to(tl.float32)[None, :, :] * x.to(tl.float32)[:, None, :]
        values = tl.sum(sums, axis=2) + tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)[None, :]
        keys = _keys_of(values, latents[None, :], inside[None, :], scale_ptr, MAGNITUDE)
        tl.store(keys_rows[:, None] + (latents - start)[None, :], keys, mask=inside[None, :])
        tl.store(values_rows[:, None] + (latents - start)[None, :], values, mask=inside[None, :])


@triton.jit
def encode_topk_redo_kernel(
    x_ptr,  # [rows, d]
    W_ptr,  # [n, d]
    todo_ptr,  # [1 + rows] int32: how many rows are to be done, and which
    bias_ptr, scale_ptr,
    keys_ptr, values_ptr,  # [programs, ROWS, BLOCK_K + CHUNK] scratch: of the k best so far, and of what comes next
    best_ptr,  # [programs, ROWS, BLOCK_K] int32 scratch: the latents of these
    list_ptr,  # [programs, BLOCK_K] int32 scratch
    found_latents_ptr, found_keys_ptr, found_values_ptr,  # [slots, k]: the best of each piece, row by row
    top_acts_ptr, top_indices_ptr,  # [rows, k]: of rows in one piece
    n, d, k, slots, x_stride, W_stride,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Go through a piece of the latents, for some rows at once, and keep the k best."""
    WIDTH: tl.constexpr = BLOCK_K + CHUNK
    todo = tl.load(todo_ptr)
    pieces = _pieces_of(todo, slots, MOST)
    blocks = tl.cdiv(todo, ROWS)
    length = tl.cdiv(tl.cdiv(n, pieces), CHUNK) * CHUNK
    own = tl.program_id(0).to(tl.int64) * ROWS
    list_row = list_ptr + tl.program_id(0).to(tl.int64) * BLOCK_K
    each, slot = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    for task in range(tl.program_id(0), blocks * pieces, tl.num_programs(0)):
        first, piece = task % blocks * ROWS, task // blocks
        row = tl.load(todo_ptr + 1 + first + each, mask=first + each < todo, other=0).to(tl.int64)
        begin, end = piece * length, tl.minimum((piece + 1) * length, n)
        tl.store(keys_ptr + (own + each)[:, None] * WIDTH + slot[None, :], tl.full([ROWS, BLOCK_K], KEY_NONE, tl.int32))
        for start in range(begin, end, CHUNK):
            stop = tl.minimum(start + CHUNK, end)
            place = (own + each) * WIDTH + BLOCK_K
            _compute(
                x_ptr, W_ptr, bias_ptr, scale_ptr, keys_ptr + place, values_ptr + place, row, start, stop, d, x_stride,
                W_stride, BLOCK_N, BLOCK_D, STAGES, MAGNITUDE,
            )  # fmt: skip
            tl.debug_barrier()  # other threads read what was written
            for number in range(0, ROWS):
                keys_row, values_row = keys_ptr + (own + number) * WIDTH, values_ptr + (own + number) * WIDTH
                best_row = best_ptr + (own + number) * BLOCK_K
                at = _list_best(keys_row, BLOCK_K + stop - start, k, list_row, BLOCK_K, BLOCK_G)
                keys = tl.load(keys_row + at, mask=slot < k, other=KEY_NONE)
                values = tl.load(values_row + at, mask=slot < k, other=0.0)
                latents = tl.load(best_row + at, mask=(slot < k) & (at < BLOCK_K), other=0)
                latents = tl.where(at < BLOCK_K, latents, start + at - BLOCK_K)
                tl.debug_barrier()  # all is read before it is written again
                tl.store(keys_row + slot, keys)
                tl.store(values_row + slot, values)
                tl.store(best_row + slot, latents)
                tl.debug_barrier()
        for number in range(0, tl.minimum(ROWS, todo - first)):
            keys = tl.load(keys_ptr + (own + number) * WIDTH + slot)
            values = tl.load(values_ptr + (own + number) * WIDTH + slot)
            latents = tl.load(best_ptr + (own + number) * BLOCK_K + slot)
            if pieces == 1:
                out = tl.load(todo_ptr + 1 + first + number).to(tl.int64) * k
                _write_chosen(slot < k, slot, latents, values, top_acts_ptr + out, top_indices_ptr + out)
            else:
                places = ((first + number) * pieces + piece) * k + slot
                tl.store(found_latents_ptr + places, latents, mask=slot < k)
                tl.store(found_keys_ptr + places, keys, mask=slot < k)
                tl.store(found_values_ptr + places, values, mask=slot < k)
        tl.debug_barrier()  # scratch is used again


@triton.jit
def encode_topk_join_kernel(
    todo_ptr, found_latents_ptr, found_keys_ptr, found_values_ptr,  # of encode_topk_redo_kernel
    list_ptr,  # [programs, BLOCK_K] int32 scratch
    top_acts_ptr, top_indices_ptr,  # [rows, k]
    k, slots,
    MOST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Select among the best of all pieces of a row."""
    todo = tl.load(todo_ptr)
    pieces = _pieces_of(todo, slots, MOST)
    slot = tl.arange(0, BLOCK_K)
    if pieces > 1:
        for number in range(tl.program_id(0), todo, tl.num_programs(0)):
            found = number * pieces * k
            list_row = list_ptr + tl.program_id(0) * BLOCK_K
            at = found + _list_best(found_keys_ptr + found, pieces * k, k, list_row, BLOCK_K, BLOCK_G)
            latents = tl.load(found_latents_ptr + at, mask=slot < k, other=0)
            values = tl.load(found_values_ptr + at, mask=slot < k, other=0.0)
            out = tl.load(todo_ptr + 1 + number).to(tl.int64) * k
            _write_chosen(slot < k, slot, latents, values, top_acts_ptr + out, top_indices_ptr + out)
            tl.debug_barrier()  # the list is used again

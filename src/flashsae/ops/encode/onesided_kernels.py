"""Triton kernels of the one-sided selection: what upper bounds leave over is rescored, and chosen from.

That this is exact, ties included, is proved in `flashsae.ops.encode.onesided`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import (
    KEY_NAN,
    KEY_NONE,
    _append,
    _choose,
    _keys_of,
    _kth_key,
    _middle,
    _select_row,
    _split,
    _to_key,
    _write_chosen,
)

KEY_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def encode_topk_first_kernel(
    upper_ptr,  # [rows, stride] bfloat16 upper bounds of keys
    max_ptr,  # [rows, groups] keys of the largest of each group
    super_ptr,  # [rows, supers] scratch; None if SUPER is 1
    list_ptr,  # [rows, 2, SHORT] scratch
    bounds_ptr,  # [rows, k] float32
    first_ptr,  # [rows, k] int32, ascending
    n, k, groups, supers, stride,
    GROUP: tl.constexpr, SUPER: tl.constexpr, BLOCK_S: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """List the k latents of each row that have the largest upper bounds, the first of equal ones."""
    row = tl.program_id(0).to(tl.int64)
    max_row = max_ptr + row * groups
    super_row = max_row
    if SUPER > 1:
        super_row = super_ptr + row * supers
        for start in range(0, supers, PIECE):
            place = start + tl.arange(0, PIECE)
            member = place[:, None] * SUPER + tl.arange(0, SUPER)[None, :]
            keys = tl.load(max_row + member, mask=member < groups, other=KEY_NONE)
            tl.store(super_row + place, tl.max(keys, axis=1), mask=place < supers)
        tl.debug_barrier()  # they were written by other threads
    _select_row(
        upper_ptr + row * stride, None, None, max_row, super_row, list_ptr + 2 * row * SHORT,
        list_ptr + (2 * row + 1) * SHORT, bounds_ptr + row * k, first_ptr + row * k, n, k, groups, supers,
        GROUP, SUPER, BLOCK_S, SHORT, TILE, False,
    )  # fmt: skip


@triton.jit
def _unbounded(key):
    """Return the key of an upper bound: what is bounded by infinity alone may be NaN, the largest key."""
    return tl.where(key >= KEY_INFINITE, KEY_NAN, key)


@triton.jit
def _bound_keys(bounds):
    return _unbounded(_to_key(bounds.to(tl.float32), KEY_NAN))


@triton.jit
def _last_at(keys, latents, inside, key):
    """Return the largest of the latents that have this key."""
    return tl.max(tl.where(inside & (keys == key), latents, -1))


@triton.jit
def _listed(
    list_row, start, n_groups, upper_row, n, tau, tau_last, least, least_last,
    GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Return the latents of PIECE groups of a list, their bounds, and which are of the first k and which are extras."""
    slot = start + tl.arange(0, PIECE)
    group = tl.load(list_row + slot, mask=slot < n_groups, other=0)
    latents = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slot < n_groups)[:, None] & (latents < n)
    bounds = _bound_keys(tl.load(upper_row + latents, mask=inside, other=0.0))
    of_first = inside & ((bounds > least) | ((bounds == least) & (latents <= least_last)))
    extra = inside & (of_first == 0) & ((bounds > tau) | ((bounds == tau) & (latents < tau_last)))
    return latents, bounds, of_first, extra


@triton.jit
def _list_groups(max_row, groups, tau, tau_last, least, least_last, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the maxima of a row by a list of the groups that hold one of the first k or an extra; return how many.

    The list may lie where the maxima do: what is written stands before what is still to be read.
    """
    found = 0
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < groups
        keys = _unbounded(tl.load(max_row + group, mask=inside, other=KEY_NONE))
        of_first = (keys > least) | ((keys == least) & (group * GROUP <= least_last))
        extra = (keys > tau) | ((keys == tau) & (group * GROUP < tau_last))
        wanted = inside & (of_first | extra)
        tl.store(max_row + found + tl.cumsum(wanted.to(tl.int32)) - 1, group, mask=wanted)
        found += tl.sum(wanted.to(tl.int32))
    return found


@triton.jit
def _largest_extras(
    list_row, n_groups, upper_row, n, tau, tau_last, least, least_last, most,
    GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Return the bound that the `most` largest extras reach, and how many may equal it; there are more than `most`."""
    low = tau
    high = KEY_NAN
    room = most
    while low < high:
        middle = _middle(low, high)
        count = 0
        above = KEY_NAN
        below = KEY_NONE
        for start in range(0, n_groups, PIECE):
            _, bounds, _, extra = _listed(
                list_row, start, n_groups, upper_row, n, tau, tau_last, least, least_last, GROUP, PIECE
            )
            part, part_above, part_below = _split(tl.where(extra, bounds, KEY_NONE), middle)
            count, above, below = count + part, tl.minimum(above, part_above), tl.maximum(below, part_below)
        room = tl.where(count < most, most - count, tl.where(count == most, most, room))
        high = tl.where(count > most, high, tl.where(count == most, above, below))
        low = tl.where(count >= most, above, low)
    return low, room


@triton.jit
def encode_topk_extras_kernel(
    upper_ptr,  # [rows, stride]
    max_ptr,  # [rows, groups]; overwritten
    bounds_ptr, first_ptr,  # [rows, k] of encode_topk_first_kernel
    dots_ptr,  # [rows, k] float32 x · w of these
    bias_ptr, scale_ptr,
    extras_ptr,  # [rows, most] int32, ascending
    merged_ptr,  # [rows, k + most] int32, ascending: a latent of the first k as it is, an extra inverted
    counts_ptr,  # [rows] int32 extras
    rest_ptr,  # [rows, 2] int32: the largest bound among extras that did not fit, and the first that has it
    n, k, groups, stride, most,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, PIECE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List the latents that may be selected in place of one of the first k, now that these have been rescored."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    inside = slot < k
    first = tl.load(first_ptr + row * k + slot, mask=inside, other=0)
    first_bounds = _bound_keys(tl.load(bounds_ptr + row * k + slot, mask=inside, other=0.0))
    least = tl.min(tl.where(inside, first_bounds, KEY_NAN))
    least_last = _last_at(first_bounds, first, inside, least)
    values = tl.load(dots_ptr + row * k + slot, mask=inside, other=0.0)
    values += tl.load(bias_ptr + first, mask=inside, other=0.0).to(tl.float32)
    keys = _keys_of(values, first, inside, scale_ptr, MAGNITUDE)
    tau = tl.min(tl.where(inside, keys, KEY_NAN))
    tau_last = _last_at(keys, first, inside, tau)

    list_row, upper_row = max_ptr + row * groups, upper_ptr + row * stride
    extras_row, merged_row = extras_ptr + row * most, merged_ptr + row * (k + most)
    n_groups = _list_groups(list_row, groups, tau, tau_last, least, least_last, GROUP, BLOCK_G)
    tl.debug_barrier()  # the list was written by other threads
    found = 0
    merged = 0
    for start in range(0, n_groups, PIECE):
        latents, _, of_first, extra = _listed(
            list_row, start, n_groups, upper_row, n, tau, tau_last, least, least_last, GROUP, PIECE
        )
        found = _append(extras_row, found, latents, extra, most)
        merged = _append(merged_row, merged, tl.where(extra, ~latents, latents), extra | of_first, k + most)
    rest = KEY_NONE
    rest_first = 0
    if found > most:
        limit, room = _largest_extras(
            list_row, n_groups, upper_row, n, tau, tau_last, least, least_last, most, GROUP, PIECE
        )
        tl.debug_barrier()  # lists are written again
        found = 0
        merged = 0
        ties = 0
        for start in range(0, n_groups, PIECE):
            latents, bounds, of_first, extra = _listed(
                list_row, start, n_groups, upper_row, n, tau, tau_last, least, least_last, GROUP, PIECE
            )
            tied = (extra & (bounds == limit)).to(tl.int32)
            counts = tl.sum(tied, axis=1)
            earlier = ties + (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(tied, axis=1)
            ties += tl.sum(counts)
            fits = extra & ((bounds > limit) | ((tied != 0) & (earlier <= room)))
            found = _append(extras_row, found, latents, fits, most)
            merged = _append(merged_row, merged, tl.where(fits, ~latents, latents), fits | of_first, k + most)
            over = tl.where(extra & (fits == 0), bounds, KEY_NONE)
            largest = tl.max(over)
            rest_first = tl.where(largest > rest, tl.min(tl.where(over == largest, latents, n)), rest_first)
            rest = tl.maximum(rest, largest)
    tl.store(counts_ptr + row, found)
    tl.store(rest_ptr + 2 * row, rest)
    tl.store(rest_ptr + 2 * row + 1, rest_first)


@triton.jit
def encode_topk_merge_kernel(
    dots_ptr,  # [rows, k] of the first k
    extra_dots_ptr,  # [rows, most]
    merged_ptr, counts_ptr, rest_ptr,  # from encode_topk_extras_kernel; counts become those of all that was rescored
    bias_ptr, scale_ptr,
    top_acts_ptr,  # [rows, k]
    top_indices_ptr,  # [rows, k]
    n, k, most,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Select among all that was rescored; count d_sae where what did not fit may be selected too."""
    row = tl.program_id(0).to(tl.int64)
    count = k + tl.load(counts_ptr + row)
    slot = tl.arange(0, BLOCK)
    inside = slot < count
    item = tl.load(merged_ptr + row * (k + most) + slot, mask=inside, other=0)
    extra = item < 0
    latents = tl.where(extra, ~item, item)
    place = tl.cumsum(extra.to(tl.int32))
    place = tl.where(extra, place - 1, slot - place)
    values = tl.load(dots_ptr + row * k + place, mask=inside & (extra == 0), other=0.0)
    others = tl.load(extra_dots_ptr + row * most + place, mask=inside & extra, other=0.0)
    values = tl.where(extra, others, values) + tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    keys = _keys_of(values, latents, inside, scale_ptr, MAGNITUDE)
    tau = _kth_key(keys, k, tl.min(tl.where(inside, keys, KEY_NAN)))
    chosen, position = _choose(keys, k, tau)
    _write_chosen(chosen, position, latents, values, top_acts_ptr + row * k, top_indices_ptr + row * k)
    rest = tl.load(rest_ptr + 2 * row)
    if rest != KEY_NONE:
        tau = tl.min(tl.where(chosen, keys, KEY_NAN))
        again = (rest > tau) | (
            (rest == tau) & (tl.load(rest_ptr + 2 * row + 1) < _last_at(keys, latents, chosen, tau))
        )
        count = tl.where(again, n, count)
    tl.store(counts_ptr + row, count)

"""Triton kernels of the one-sided selection: what a screen leaves open is rescored, and chosen from.

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
from flashsae.ops.encode.redo_kernels import note_row

KEY_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _error(centres, facts_ptr, width, place, inside, t, p, q, SHARE: tl.constexpr = 1.0):
    """Return by how much keys may differ from the centres of some latents, or of groups of them, or a SHARE of that.

    Centres were rounded to nearest, which a share says nothing of. What weighs nothing and has a centre of 0 is 0; else
    some of it may have been lost among the smallest numbers.
    """
    scales = tl.load(facts_ptr + place, mask=inside, other=0.0)
    norms = tl.load(facts_ptr + width + place, mask=inside, other=0.0)
    spread = scales * p + norms * q
    size = tl.abs(centres)
    slack = size * 0.00396728515625 + tl.where(size + spread > 0.0, 2.4e-38, 0.0)
    return tl.where(size < float("inf"), slack, 0.0) + SHARE * (t * spread)


@triton.jit
def _upper_keys(values):
    """Return keys of upper bounds: what infinity alone bounds may be NaN, the largest key."""
    keys = _to_key(values, KEY_NAN)
    return tl.where(keys >= KEY_INFINITE, KEY_NAN, keys)


@triton.jit
def _bounds_of(centres, latents, inside, source, MAGNITUDE: tl.constexpr, SHARE: tl.constexpr = 1.0):
    """Return the keys of lower and upper bounds of keys, or with a SHARE of the error of what lies nearer.

    Those of a token of zeros are known: they are its biases'.
    """
    _, column_ptr, bias_ptr, scale_ptr, n, t, p, q = source
    error = _error(centres, column_ptr, n, latents, inside, t, p, q, SHARE)
    if (p == 0.0) & (q == 0.0):
        biases = tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
        keys = _keys_of(biases, latents, inside, scale_ptr, MAGNITUDE)
        known = (error == error) & (centres < float("inf"))  # else weights that are not finite
        low, high = tl.where(known, keys, KEY_NONE), tl.where(known, keys, KEY_NAN)
    else:
        high = _upper_keys(centres + error)
        lowest = centres - error
        if MAGNITUDE:
            lowest = tl.where(lowest < 0.0, 0.0, lowest)
        low = _to_key(lowest, KEY_NONE)
    return low, high


@triton.jit
def _last_at(keys, latents, inside, key):
    """Return the largest of the latents that have this key."""
    return tl.max(tl.where(inside & (keys == key), latents, -1))


@triton.jit
def encode_topk_first_kernel(
    centre_ptr,  # [rows, stride] bfloat16: keys, up to errors that the facts bound; infinity for NaN
    max_ptr,  # [rows, max_stride] keys of the largest of each group
    super_ptr,  # [rows, supers] the largest of SUPER of these; the same if SUPER is 1
    list_ptr,  # [rows, 2, SHORT] scratch
    largest_ptr,  # [rows, k] float32
    first_ptr,  # [rows, k] int32
    n, k, groups, supers, stride, max_stride, super_stride,
    GROUP: tl.constexpr, SUPER: tl.constexpr, BLOCK_S: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the k largest centres and their latents, ascending."""
    row = tl.program_id(0).to(tl.int64)
    _select_row(
        centre_ptr + row * stride, None, None, max_ptr + row * max_stride, super_ptr + row * super_stride,
        list_ptr + 2 * row * SHORT, list_ptr + (2 * row + 1) * SHORT, largest_ptr + row * k, first_ptr + row * k,
        n, k, groups, supers, GROUP, SUPER, BLOCK_S, SHORT, TILE, False,
    )  # fmt: skip


@triton.jit
def encode_topk_supers_kernel(max_ptr, super_ptr, groups, supers, max_stride, SUPER: tl.constexpr, BLOCK: tl.constexpr):
    """Write the largest of each SUPER maxima."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    member = place[:, None] * SUPER + tl.arange(0, SUPER)[None, :]
    maxima = tl.load(max_ptr + row * max_stride + member, mask=member < groups, other=KEY_NONE)
    tl.store(super_ptr + row * supers + place, tl.max(maxima, axis=1), mask=place < supers)


@triton.jit
def _limits(
    largest_row, first_row, k, source, BLOCK_K: tl.constexpr, MAGNITUDE: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    """Return a guess at the smallest key of the first k, the last of them that may have it; the same of their centres.

    A guess too high makes a row be done as a whole, one too low a list long. Those of which nothing is known are left
    out.
    """
    slot = tl.arange(0, BLOCK_K)
    inside = slot < k
    first = tl.load(first_row + slot, mask=inside, other=0)
    centres = tl.load(largest_row + slot, mask=inside, other=float("inf"))
    keys = _to_key(centres, KEY_NAN)
    least = tl.min(keys)
    low, _ = _bounds_of(centres, first, inside, source, MAGNITUDE, SHARE)
    known = inside & (centres < float("inf")) & (low != KEY_NONE)
    low = tl.where(known, low, KEY_NAN)
    guess = tl.min(low)
    guess_last = tl.max(tl.where(inside & ((low == guess) | (known == 0)), first, -1))
    return guess, guess_last, least, _last_at(keys, first, inside, least)


@triton.jit
def _list_groups(max_row, groups, of_groups_ptr, source, limits, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the maxima of a row by a list of the groups that hold one of the first k or an extra; return how many.

    The list may lie where the maxima do: what is written stands before what is still to be read.
    """
    guess, guess_last, least, least_last = limits
    _, _, _, _, _, t, p, q = source
    known = tl.where((p == 0.0) & (q == 0.0), 2.4e-38, 0.0)  # a bias may be smaller than its centre can tell
    found = 0
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < groups
        keys = tl.load(max_row + group, mask=inside, other=KEY_NONE)
        largest = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        high = _upper_keys(largest + _error(largest, of_groups_ptr, groups, group, inside, t, p, q) + known)
        of_first = (keys > least) | ((keys == least) & (group * GROUP <= least_last))
        extra = (high > guess) | ((high == guess) & (group * GROUP < guess_last))
        wanted = inside & (of_first | extra)
        tl.store(max_row + found + tl.cumsum(wanted.to(tl.int32)) - 1, group, mask=wanted)
        found += tl.sum(wanted.to(tl.int32))
    tl.debug_barrier()  # other threads read the list
    return found


@triton.jit
def _listed(
    groups_row, start, n_groups, source, limits, GROUP: tl.constexpr, PIECE: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """Return the latents of PIECE groups of a list, their bounds, and which are of the first k and which are extras."""
    guess, guess_last, least, least_last = limits
    centre_row, _, _, _, n, _, _, _ = source
    slot = start + tl.arange(0, PIECE)
    group = tl.load(groups_row + slot, mask=slot < n_groups, other=0)
    latents = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slot < n_groups)[:, None] & (latents < n)
    centres = tl.load(centre_row + latents, mask=inside, other=0.0).to(tl.float32)
    keys = _to_key(centres, KEY_NAN)
    of_first = inside & ((keys > least) | ((keys == least) & (latents <= least_last)))
    _, high = _bounds_of(centres, latents, inside, source, MAGNITUDE)
    extra = inside & (of_first == 0) & ((high > guess) | ((high == guess) & (latents < guess_last)))
    return latents, high, of_first, extra


@triton.jit
def _append_both(items_row, keys_row, found, latents, keys, of_first, extra, capacity):
    """Append latents of the first k as they are and extras inverted, and the keys of their bounds."""
    _append(keys_row, found, keys, of_first | extra, capacity)
    return _append(items_row, found, tl.where(extra, ~latents, latents), of_first | extra, capacity)


@triton.jit
def _largest_extras(
    groups_row, n_groups, source, limits, most, GROUP: tl.constexpr, PIECE: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """Return the bound that the `most` largest extras reach, and how many may equal it; there are more than `most`."""
    low = limits[0]
    high = KEY_NAN
    room = most
    while low < high:
        middle = _middle(low, high)
        count = 0
        above = KEY_NAN
        below = KEY_NONE
        for start in range(0, n_groups, PIECE):
            _latents, keys, _of_first, extra = _listed(
                groups_row, start, n_groups, source, limits, GROUP, PIECE, MAGNITUDE
            )
            part, part_above, part_below = _split(tl.where(extra, keys, KEY_NONE), middle)
            count, above, below = count + part, tl.minimum(above, part_above), tl.maximum(below, part_below)
        room = tl.where(count < most, most - count, tl.where(count == most, most, room))
        high = tl.where(count > most, high, tl.where(count == most, above, below))
        low = tl.where(count >= most, above, low)
    return low, room


@triton.jit
def _list_largest(
    items_row, keys_row, groups_row, n_groups, source, limits, k, most, GROUP: tl.constexpr, PIECE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List the first k and the `most` largest extras. Return the largest bound of the others, and who first has it."""
    bound, room = _largest_extras(groups_row, n_groups, source, limits, most, GROUP, PIECE, MAGNITUDE)
    tl.debug_barrier()  # the list is written again
    n = source[4]
    found = 0
    ties = 0
    rest = KEY_NONE
    rest_first = 0
    for start in range(0, n_groups, PIECE):
        latents, keys, of_first, extra = _listed(groups_row, start, n_groups, source, limits, GROUP, PIECE, MAGNITUDE)
        tied = (extra & (keys == bound)).to(tl.int32)
        counts = tl.sum(tied, axis=1)
        earlier = ties + (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(tied, axis=1)
        ties += tl.sum(counts)
        fits = extra & ((keys > bound) | ((tied != 0) & (earlier <= room)))
        found = _append_both(items_row, keys_row, found, latents, keys, of_first, fits, k + most)
        over = tl.where(extra & (fits == 0), keys, KEY_NONE)
        largest = tl.max(over)
        rest_first = tl.where(largest > rest, tl.min(tl.where(over == largest, latents, n)), rest_first)
        rest = tl.maximum(rest, largest)
    return rest, rest_first


@triton.jit
def encode_topk_open_kernel(
    centre_ptr,  # as in `encode_topk_first_kernel`
    max_ptr,  # as there; overwritten
    of_tokens_ptr, of_latents_ptr, of_groups_ptr,  # [3, rows] t, p, q; [2, n] and [2, groups] S, A
    bias_ptr, scale_ptr,
    largest_ptr, first_ptr,  # from there
    items_ptr,  # [rows, k + most] int32, ascending: the first k as they are, extras inverted
    keys_ptr,  # [rows, k + most] int32: of their upper bounds
    counts_ptr,  # [rows] int32: how many they are
    rest_ptr,  # [rows, 2] int32: all other latents have a smaller bound, or this one from this latent on
    n, k, most, groups, stride, max_stride, tokens_stride,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, PIECE: tl.constexpr, MAGNITUDE: tl.constexpr,
    SHARE: tl.constexpr,  # of the error, by which keys are guessed to lie below their centres
):  # fmt: skip
    """List what may be selected: the latents of the k largest centres, and what may displace one of them."""
    row = tl.program_id(0).to(tl.int64)
    centre_row, max_row = centre_ptr + row * stride, max_ptr + row * max_stride
    first_row, largest_row = first_ptr + row * k, largest_ptr + row * k
    t, p = tl.load(of_tokens_ptr + row), tl.load(of_tokens_ptr + tokens_stride + row)
    q = tl.load(of_tokens_ptr + 2 * tokens_stride + row)
    source = centre_row, of_latents_ptr, bias_ptr, scale_ptr, n, t, p, q
    limits = _limits(largest_row, first_row, k, source, BLOCK_K, MAGNITUDE, SHARE)
    items_row, keys_row = items_ptr + row * (k + most), keys_ptr + row * (k + most)
    n_groups = _list_groups(max_row, groups, of_groups_ptr, source, limits, GROUP, BLOCK_G)
    found = 0
    for start in range(0, n_groups, PIECE):
        latents, keys, of_first, extra = _listed(max_row, start, n_groups, source, limits, GROUP, PIECE, MAGNITUDE)
        found = _append_both(items_row, keys_row, found, latents, keys, of_first, extra, k + most)
    rest, rest_first, _, _ = limits
    if found > k + most:
        rest, rest_first = _list_largest(
            items_row, keys_row, max_row, n_groups, source, limits, k, most, GROUP, PIECE, MAGNITUDE
        )
        found = k + most
    tl.store(counts_ptr + row, found)
    tl.store(rest_ptr + 2 * row, rest)
    tl.store(rest_ptr + 2 * row + 1, rest_first)


@triton.jit
def encode_topk_extras_kernel(
    first_ptr, dots_ptr,  # [rows, k] the first k and their x · w, float32
    items_ptr, keys_ptr, counts_ptr,  # of encode_topk_open_kernel; what is not needed leaves items and counts
    bias_ptr, scale_ptr,
    extras_ptr,  # [rows, k + most] int32, ascending
    extra_counts_ptr,  # [rows] int32
    k, most,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List what may still displace one of the first k, now that these have been rescored."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    inside = slot < k
    first = tl.load(first_ptr + row * k + slot, mask=inside, other=0)
    values = tl.load(dots_ptr + row * k + slot, mask=inside, other=0.0)
    values += tl.load(bias_ptr + first, mask=inside, other=0.0).to(tl.float32)
    keys = _keys_of(values, first, inside, scale_ptr, MAGNITUDE)
    tau = tl.min(tl.where(inside, keys, KEY_NAN))
    tau_last = _last_at(keys, first, inside, tau)

    items_row = items_ptr + row * (k + most)
    slots = tl.arange(0, BLOCK)
    listed = slots < tl.load(counts_ptr + row)
    items = tl.load(items_row + slots, mask=listed, other=0)
    high = tl.load(keys_ptr + row * (k + most) + slots, mask=listed, other=KEY_NONE)
    latents = tl.where(items < 0, ~items, items)
    extra = listed & (items < 0) & ((high > tau) | ((high == tau) & (latents < tau_last)))
    kept = (listed & (items >= 0)) | extra
    tl.debug_barrier()  # all is read before it is written again
    tl.store(items_row + tl.cumsum(kept.to(tl.int32)) - 1, items, mask=kept)
    tl.store(extras_ptr + row * (k + most) + tl.cumsum(extra.to(tl.int32)) - 1, latents, mask=extra)
    tl.store(extra_counts_ptr + row, tl.sum(extra.to(tl.int32)))
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32)))


@triton.jit
def encode_topk_merge_kernel(
    dots_ptr,  # [rows, k] of the first k
    extra_dots_ptr,  # [rows, k + most]
    items_ptr, rest_ptr, counts_ptr,  # from the kernels above; counts are set to d_sae where the rest still matters
    todo_ptr,  # [1 + rows] int32: receives these rows
    bias_ptr, scale_ptr,
    top_acts_ptr,  # [rows, k]
    top_indices_ptr,  # [rows, k]
    n, k, most,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Select among all that was rescored."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    slot = tl.arange(0, BLOCK)
    inside = slot < count
    item = tl.load(items_ptr + row * (k + most) + slot, mask=inside, other=0)
    extra = item < 0
    latents = tl.where(extra, ~item, item)
    place = tl.cumsum(extra.to(tl.int32))
    place = tl.where(extra, place - 1, slot - place)
    values = tl.load(dots_ptr + row * k + place, mask=inside & (extra == 0), other=0.0)
    others = tl.load(extra_dots_ptr + row * (k + most) + place, mask=inside & extra, other=0.0)
    values = tl.where(extra, others, values) + tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    keys = _keys_of(values, latents, inside, scale_ptr, MAGNITUDE)
    tau = _kth_key(keys, k, tl.min(tl.where(inside, keys, KEY_NAN)))
    chosen, position = _choose(keys, k, tau)
    _write_chosen(chosen, position, latents, values, top_acts_ptr + row * k, top_indices_ptr + row * k)
    tau = tl.min(tl.where(chosen, keys, KEY_NAN))
    rest = tl.load(rest_ptr + 2 * row)
    missed = (rest > tau) | ((rest == tau) & (tl.load(rest_ptr + 2 * row + 1) < _last_at(keys, latents, chosen, tau)))
    if missed:
        note_row(todo_ptr, row)
    tl.store(counts_ptr + row, tl.where(missed, n, count))

"""Triton kernels that select the B·k largest pre-activations of a batch, exactly, without holding all of them.

Keys are those of `ops.encode.kernels`. A bound rises from part to part of the rows, what reaches it is listed, and the
list is chosen from in the end: docs/methodology.md#selection-over-a-batch. `state` is the bound's key, the logarithm of
the width of bins in the next histogram, how many keys lie above the bin that the bound begins, and whether that bin is
one key. Atomics add integers only, so no result depends on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashsae.ops.encode.kernels import KEY_NAN, KEY_NONE, _bounds, _keys_of, _magnitudes, _pre_acts, _scaled, _to_key

LOWEST = tl.constexpr(-(2**31) + 1)  # below every latent, above KEY_NONE
INFINITE = tl.constexpr(0x7F800000)  # the key of infinity, as which NaN counts in maxima of groups
TOP = tl.constexpr(18)  # a key without so many of its bits is a bin of the coarse histogram
BINS = tl.constexpr(16384)  # of a histogram; behind them stands how many keys lie beyond the last
SIDE = tl.constexpr(128)  # BINS is its square
NEAR = tl.constexpr(256)


@triton.jit
def bound_of(state_ptr):
    """Return the bound of a state; that of one that is all zeros is reached by every key."""
    return tl.load(state_ptr) + LOWEST


@triton.jit
def shift_of(state_ptr):
    """Return the logarithm of the width of bins; those of a state that is all zeros are the top bits."""
    return tl.load(state_ptr + 1) + TOP


@triton.jit
def _inverse(unit):
    """Return 1 / unit of a power of two, exactly, which a division on a GPU need not be."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _lower(low, unit):
    """Take a lower bound from the unit of its token to that of all, rounding down; beyond float32 it says no more."""
    low = low * _inverse(unit) - 2.4e-38  # what is lost below the smallest normal number
    return tl.where(low > 3.4028234e38, 3.4028234e38, low)


@triton.jit
def _upper(high, unit):
    return high * _inverse(unit) + 2.4e-38


@triton.jit
def _value_of(key):
    """Return the value of the key of a maximum."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _place_of(bin):
    """Return where a bin stands in a histogram: neighbours, which are hit at once, in different lines of the cache."""
    return (bin % SIDE) * SIDE + bin // SIDE


@triton.jit
def _count_keys(keys, inside, hist_ptr, low, shift):
    """Add keys that reach `low` to the histogram; bins are 2 ** shift wide."""
    count_type: tl.constexpr = hist_ptr.dtype.element_ty
    inside = inside & (keys >= low)
    above = (keys - low.to(tl.int32)).to(tl.uint32, bitcast=True)  # of those that reach it, exactly
    bin = tl.minimum(above >> shift.to(tl.uint32), BINS).to(tl.int32)
    beyond = tl.sum((inside & (bin == BINS)).to(tl.int32))
    if beyond > 0:
        tl.atomic_add(hist_ptr + BINS, beyond.to(count_type), sem="relaxed")
    inside = inside & (bin < BINS)
    first = tl.min(tl.where(inside, bin, BINS))
    last = tl.max(tl.where(inside, bin, -1))
    if first == last:  # ties would make atomics wait for each other
        tl.atomic_add(hist_ptr + _place_of(first), tl.sum(inside.to(tl.int32)).to(count_type), sem="relaxed")
    else:
        ones = tl.full(bin.shape, 1, count_type)
        tl.atomic_add(hist_ptr + _place_of(tl.where(inside, bin, 0)), ones, mask=inside, sem="relaxed")


@triton.jit
def _count_coarsely(keys, inside, hist_ptr):
    """Add keys to a histogram of their top bits, by way of one of the tile: keys crowd into few bins."""
    bin = (keys.to(tl.int32) >> TOP) + BINS // 2
    top = tl.max(tl.where(inside, bin, -1))
    behind = tl.where(inside, top - bin, NEAR)
    near = tl.arange(0, 2 * NEAR)
    counts = tl.histogram(tl.minimum(behind, NEAR), 2 * NEAR)
    place = _place_of(tl.maximum(top - near, 0))
    tl.atomic_add(hist_ptr + place, counts, mask=(near < NEAR) & (counts > 0), sem="relaxed")
    far = inside & (behind >= NEAR)
    ones = tl.full(bin.shape, 1, tl.int32)
    tl.atomic_add(hist_ptr + _place_of(tl.where(far, bin, 0)), ones, mask=far, sem="relaxed")


@triton.jit
def _listed(list_ptr, start, count, n, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Return the latents of some listed groups, ascending, and which of them there are."""
    slot = start + tl.arange(0, TILE // GROUP)
    group = tl.load(list_ptr + slot, mask=slot < count, other=0)
    latents = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [TILE])
    inside = tl.reshape(tl.broadcast_to((slot < count)[:, None], [TILE // GROUP, GROUP]), [TILE])
    return latents, inside & (latents < n)


@triton.jit
def _load_keys(
    latents, inside, raw_ptr, row, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Return keys and values of some latents of a token; certified: keys of lower and of upper bounds."""
    if column_ptr is None:
        values = _pre_acts(raw_ptr + row * raw_stride, bias_ptr, latents, inside)
        return _keys_of(values, latents, inside, scale_ptr, MAGNITUDE), values
    else:
        low, high = _bounds(
            tl.load(raw_ptr + row * raw_stride + latents, mask=inside, other=0.0).to(tl.float32),
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
        unit = tl.load(row_ptr + row)
        low, high = _to_key(_lower(low, unit), LOWEST), _to_key(_upper(high, unit), KEY_NAN)
        return tl.where(inside, low, KEY_NONE), tl.where(inside, high, KEY_NONE)


@triton.jit
def select_histogram_kernel(
    keys_ptr,  # [n] int32
    used_ptr,  # how many of these there are, or None
    n,
    hist_ptr,  # [BINS + 1]
    state_ptr,  # [4] int64
    row_ptr,  # [3, rows] facts of tokens, in whose units the keys are; or None
    width,  # keys of a token
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the keys that reach the bound: by their top bits (coarse), or in bins that begin at the bound."""
    count = n
    if used_ptr is not None:
        used = tl.load(used_ptr)
        count = tl.where(used > n, 0, used).to(tl.int32)  # of a list that is incomplete nothing is wanted
    low, shift = bound_of(state_ptr), shift_of(state_ptr)
    if tl.load(state_ptr + 3) != 0:
        count = 0
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + slot, mask=slot < count, other=KEY_NONE)
        if row_ptr is not None:
            unit = tl.load(row_ptr + slot // width, mask=slot < count, other=1.0)
            keys = tl.where(slot < count, _to_key(_lower(_value_of(keys), unit), LOWEST), KEY_NONE)
        if COARSE:
            _count_coarsely(keys, keys >= low, hist_ptr)
        else:
            _count_keys(keys, slot < count, hist_ptr, low, shift)


@triton.jit
def select_bound_kernel(
    hist_ptr,  # [BINS + 1]
    state_ptr,  # [4] int64: what the histogram was counted by
    out_ptr,  # [4] int64: what follows; may be the same
    used_ptr,  # int64: how many entries were wanted
    capacity,
    wanted,
    next_shift,  # -1: as fine as what is left can be resolved
    COARSE: tl.constexpr,
    ONLY_REDO: tl.constexpr,  # run only if more entries were wanted than the capacity
):
    """Raise the bound to the lower edge of the bin in which the number of keys, counted from above, reaches `wanted`.

    The histogram of the way out is emptied, others are as they were.
    """
    runs = tl.load(state_ptr + 3) == 0
    if ONLY_REDO:
        runs = tl.load(used_ptr) > capacity
    if runs:
        bound, shift = bound_of(state_ptr), shift_of(state_ptr)
        low = bound
        if COARSE:
            low = tl.full([], -(2**31), tl.int64)
            shift = tl.full([], TOP, tl.int64)
        place = tl.arange(0, SIDE)
        beyond = tl.load(hist_ptr + BINS).to(tl.int64)
        sums = tl.sum(tl.load(hist_ptr + place[:, None] + place[None, :] * SIDE).to(tl.int64), axis=1)
        from_above = beyond + tl.sum(sums) - tl.cumsum(sums) + sums
        block = tl.max(tl.where(from_above >= wanted, place, -1))
        above_block = beyond + tl.sum(tl.where(place > block, sums, 0))
        bins = tl.load(hist_ptr + tl.maximum(block, 0) + place * SIDE).to(tl.int64)
        from_above = above_block + tl.sum(bins) - tl.cumsum(bins) + bins
        bin = tl.max(tl.where(from_above >= wanted, place, -1))
        above = above_block + tl.sum(tl.where(place > bin, bins, 0))
        width = tl.full([], 1, tl.int64) << shift
        edge = low + (block * SIDE + bin).to(tl.int64) * width
        if beyond >= wanted:
            edge = low + width * BINS
            width = 2147483648 - edge
            above = tl.full([], 0, tl.int64)
        elif block < 0:
            edge = bound
            width = 2147483648 - edge
            above = tl.full([], 0, tl.int64)
        next = tl.full([], next_shift, tl.int64)
        if next_shift < 0:
            next = tl.full([], 0, tl.int64)
            while (tl.full([], BINS, tl.int64) << next) < width:
                next += 1
        tl.store(out_ptr, tl.maximum(edge, bound) - LOWEST)
        tl.store(out_ptr + 1, next - TOP)
        tl.store(out_ptr + 2, above)
        tl.store(out_ptr + 3, (width == 1).to(tl.int64))
        if ONLY_REDO:
            tl.debug_barrier()  # all was read
            zeros = tl.zeros([SIDE, SIDE], hist_ptr.dtype.element_ty)
            tl.store(hist_ptr + place[:, None] * SIDE + place[None, :], zeros)
            tl.store(hist_ptr + BINS, tl.full([], 0, hist_ptr.dtype.element_ty))


@triton.jit
def select_groups_kernel(
    raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr,  # as in encode_topk_group_max_kernel
    maxima_ptr,  # [rows, groups] largest key of each group, certified: of the upper bounds; lists take their place
    counts_ptr,  # [rows, chunks]
    hist_ptr,  # [BINS + 1]
    state_ptr,  # [4] int64
    rows, n, groups, chunks, raw_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List the groups of a chunk that reach the bound, and count their latents that do, certified: for certain."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low, shift = bound_of(state_ptr), shift_of(state_ptr)
    group = chunk * BLOCK_G + tl.arange(0, BLOCK_G)
    maxima = tl.load(maxima_ptr + row * groups + group, mask=group < groups, other=KEY_NONE)
    if row_ptr is not None:
        maxima = _to_key(_upper(_value_of(maxima), tl.load(row_ptr + row)), KEY_NAN)
    reach = ((maxima >= tl.minimum(low, INFINITE)) & (group < groups)).to(tl.int32)
    listed = tl.sum(reach)
    list_ptr = maxima_ptr + row * groups + chunk * BLOCK_G
    tl.store(counts_ptr + row * chunks + chunk, listed)
    tl.debug_barrier()  # all maxima were read
    tl.store(list_ptr + tl.cumsum(reach) - 1, group, mask=reach != 0)
    tl.debug_barrier()  # other threads read the list
    for start in range(0, listed, TILE // GROUP):
        latents, inside = _listed(list_ptr, start, listed, n, GROUP, TILE)
        keys, _ = _load_keys(
            latents, inside, raw_ptr, row, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride, MAGNITUDE
        )
        _count_keys(keys, inside, hist_ptr, low, shift)


@triton.jit
def _tile_of_list(
    list_ptr, start, listed, low, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, row, rows, n, raw_stride,
    GROUP: tl.constexpr, TILE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Return some latents of listed groups, their keys and values, and which reach the bound, certified: may reach."""
    latents, inside = _listed(list_ptr, start, listed, n, GROUP, TILE)
    keys, other = _load_keys(
        latents, inside, raw_ptr, row, bias_ptr, scale_ptr, column_ptr, row_ptr, rows, n, raw_stride, MAGNITUDE
    )
    return latents, keys, other, inside & ((keys if column_ptr is None else other) >= low)


@triton.jit
def select_reach_kernel(
    raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr,  # as in encode_topk_group_max_kernel
    lists_ptr,  # [rows, groups] from select_groups_kernel
    counts_ptr,  # [rows, chunks] from there
    state_ptr,  # [4] int64
    reach_ptr,  # [rows, chunks] int32: how many latents of a chunk reach the bound, certified: may reach it
    sums_ptr,  # [rows * chunks / SPAN] int64, of zeros: sums of these
    rows, n, groups, chunks, raw_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Count the latents of a chunk that reach the bound, for `select_append_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low = bound_of(state_ptr)
    list_ptr = lists_ptr + row * groups + chunk * BLOCK_G
    number = row * chunks + chunk
    listed = tl.load(counts_ptr + number)
    total = 0
    for start in range(0, listed, TILE // GROUP):
        _, _, _, reach = _tile_of_list(
            list_ptr, start, listed, low, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, row, rows, n, raw_stride,
            GROUP, TILE, MAGNITUDE,
        )  # fmt: skip
        total += tl.sum(reach.to(tl.int32))
    tl.store(reach_ptr + number, total)
    if total > 0:
        tl.atomic_add(sums_ptr + number // SPAN, total.to(tl.int64), sem="relaxed")


@triton.jit
def _sum_before(numbers_ptr, end, BLOCK: tl.constexpr):
    """Return the sum of the numbers before `end`, which are at most BLOCK."""
    place = tl.arange(0, BLOCK)
    return tl.sum(tl.load(numbers_ptr + place, mask=place < end, other=0).to(tl.int64))


@triton.jit
def select_append_kernel(
    raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr,  # as in encode_topk_group_max_kernel
    lists_ptr,  # [rows, groups] from select_groups_kernel
    counts_ptr,  # [rows, chunks] from there
    state_ptr,  # [4] int64
    reach_ptr, sums_ptr,  # [rows, chunks], [rows * chunks / SPAN] from select_reach_kernel
    used_ptr,  # [2] int64: how many entries were wanted before; and now, which is set
    keys_ptr,  # [capacity] int32
    values_ptr,  # [capacity] float32; certified: int32 keys of the upper bounds
    latents_ptr,  # [capacity] int32
    tokens_ptr,  # [capacity] int32, or None
    begins_ptr,  # [B + 1] int32: where the entries of a token begin
    first,  # token of the first row
    capacity, rows, n, groups, chunks, raw_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Append the latents of a chunk that reach the bound, certified: that may, by token, then ascending."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low = bound_of(state_ptr)
    list_ptr = lists_ptr + row * groups + chunk * BLOCK_G
    number = row * chunks + chunk
    span = number // SPAN
    used = tl.load(used_ptr)
    place = used + _sum_before(sums_ptr, span, SPANS) + _sum_before(reach_ptr + span * SPAN, number - span * SPAN, SPAN)
    total = tl.load(reach_ptr + number)
    if chunk == 0:
        tl.store(begins_ptr + first + row, tl.minimum(place, capacity).to(tl.int32))
    if number == tl.num_programs(0).to(tl.int64) * chunks - 1:
        tl.store(used_ptr + 1, place + total)
        tl.store(begins_ptr + first + row + 1, tl.minimum(place + total, capacity).to(tl.int32))
    listed = tl.where(total > 0, tl.load(counts_ptr + number), 0)
    end, none = tl.minimum(place + total, capacity), tl.full([TILE], KEY_NONE, tl.int32)
    for start in range(0, listed, TILE // GROUP):
        latents, keys, other, chosen = _tile_of_list(
            list_ptr, start, listed, low, raw_ptr, bias_ptr, scale_ptr, column_ptr, row_ptr, row, rows, n, raw_stride,
            GROUP, TILE, MAGNITUDE,
        )  # fmt: skip
        position = place + tl.cumsum(chosen.to(tl.int32)) - 1
        place += tl.sum(chosen.to(tl.int32))
        chosen &= position < end
        tl.store(keys_ptr + position, keys, mask=chosen)
        tl.store(values_ptr + position, other, mask=chosen)
        tl.store(latents_ptr + position, latents, mask=chosen)
        if tokens_ptr is not None:
            tl.store(tokens_ptr + position, none * 0 + (first + row).to(tl.int32), mask=chosen)
    # The kernel that counts may round bounds otherwise, by less than they are wide: places left are never selected.
    for start in range(0, (end - place).to(tl.int32), TILE):
        position = place + start + tl.arange(0, TILE)
        tl.store(keys_ptr + position, none, mask=position < end)
        tl.store(values_ptr + position, none.to(values_ptr.dtype.element_ty), mask=position < end)
        tl.store(latents_ptr + position, none * 0, mask=position < end)
        if tokens_ptr is not None:
            tl.store(tokens_ptr + position, none * 0 + (first + row).to(tl.int32), mask=position < end)

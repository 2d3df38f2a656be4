"""Triton kernels that select the k largest of each row of pre-activations, exactly, reading the row once.

Keys are float32 values mapped to int32 so that integers order as the values do; NaN is the largest. Two passes:
`group_max` reduces groups of consecutive latents to their largest key, `select` reads again only the groups that can
hold a selected latent. Why that is exact, also for ties, is proved in docs/methodology.md#exact-selection. A row of few
latents is chosen from in one pass, by `whole`.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEY_NONE = tl.constexpr(-(2**31))  # padding: below every latent
KEY_NAN = tl.constexpr(2**31 - 1)
KEY_INF = tl.constexpr(0x7F800000)


@triton.jit
def _to_key(value, nan_key):
    """Map float32 to int32 in order; -0 equals +0."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, nan_key, key)


@triton.jit
def _keys_of(values, latents, inside, scale_ptr, MAGNITUDE: tl.constexpr):
    """Return the keys that latents are selected by."""
    if scale_ptr is not None:
        values = values * tl.load(scale_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    if MAGNITUDE:
        values = tl.abs(values)
    return tl.where(inside, _to_key(values, KEY_NAN), KEY_NONE)


@triton.jit
def _middle(low, high):
    """Round (low + high) / 2 up, without overflow."""
    return (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)


@triton.jit
def _split(keys, middle):
    """Return how many keys reach middle, the smallest of these, and the largest of the others."""
    reach = keys >= middle
    above = tl.min(tl.where(reach, keys, KEY_NAN))
    below = tl.max(tl.where(reach, KEY_NONE, keys))
    return tl.sum(reach.to(tl.int32)), above, below


@triton.jit
def _kth_key(keys, k, low):
    """Return a t that exactly k keys reach, or if ties forbid that, the k-th largest key. At least k keys reach `low`.

    Bisection that moves its bounds to keys that occur: it ends after about log2 of the distinct keys in play, not
    after 32 steps.
    """
    high = tl.max(keys)
    while low < high:
        middle = _middle(low, high)
        count, above, below = _split(keys, middle)
        high = tl.where(count > k, high, tl.where(count == k, above, below))
        low = tl.where(count >= k, above, low)
    return low


@triton.jit
def _kth_key_of_row(keys, k, low):
    """Return what _kth_key does, for keys spread over many threads, where sums cost more than steps.

    Plain bisection of 32 bits: a third more steps, each with one sum over all threads instead of three.
    """
    high = tl.max(keys)
    while low < high:
        middle = _middle(low, high)
        count = tl.sum((keys >= middle).to(tl.int32))
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
        low = tl.where(count >= k, middle, low)
    return low


@triton.jit
def _kth_key_in_memory(keys_ptr, n, k, BLOCK: tl.constexpr):
    """Return what _kth_key does for the n keys at keys_ptr, and how many may equal it and still be chosen."""
    offsets = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + offsets, mask=offsets < n, other=KEY_NONE)
    low, high = tl.min(tl.where(offsets < n, keys, KEY_NAN)), tl.max(keys)
    for start in range(BLOCK, n, BLOCK):
        part = tl.load(keys_ptr + start + offsets, mask=start + offsets < n, other=KEY_NONE)
        low = tl.minimum(low, tl.min(tl.where(start + offsets < n, part, KEY_NAN)))
        high = tl.maximum(high, tl.max(part))
    room = k
    while low < high:
        middle = _middle(low, high)
        count, above, below = _split(keys, middle)
        for start in range(BLOCK, n, BLOCK):
            part = tl.load(keys_ptr + start + offsets, mask=start + offsets < n, other=KEY_NONE)
            part_count, part_above, part_below = _split(part, middle)
            count, above, below = count + part_count, tl.minimum(above, part_above), tl.maximum(below, part_below)
        room = tl.where(count < k, k - count, tl.where(count == k, k, room))
        high = tl.where(count > k, high, tl.where(count == k, above, below))
        low = tl.where(count >= k, above, low)
    return low, room


@triton.jit
def _choose(keys, k, tau):
    """Return which keys are the k largest, the first of equal ones, and their places in order; tau as of _kth_key."""
    chosen = keys >= tau
    if tl.sum(chosen.to(tl.int32)) > k:
        above = keys > tau
        tied = chosen & (above == 0)
        room = k - tl.sum(above.to(tl.int32))
        chosen = above | (tied & (tl.cumsum(tied.to(tl.int32)) <= room))
    return chosen, tl.cumsum(chosen.to(tl.int32)) - 1


@triton.jit
def _pre_acts(raw_ptr, bias_ptr, latents, inside):
    """Load products of a row and add the bias, if there is one."""
    values = tl.load(raw_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _write_chosen(chosen, position, latents, values, top_acts_ptr, top_indices_ptr):
    """Write what was chosen of a row to its places."""
    tl.store(top_acts_ptr + position, values, mask=chosen)
    tl.store(top_indices_ptr + position, latents.to(tl.int64), mask=chosen)


@triton.jit
def _write_selection(keys, latents, values, k, tau, top_acts_ptr, top_indices_ptr):
    """Write the k largest of a row, lowest latent first; `keys` stand in ascending order of `latents`."""
    chosen, position = _choose(keys, k, tau)
    _write_chosen(chosen, position, latents, values, top_acts_ptr, top_indices_ptr)


@triton.jit
def _bounds(raw, bias, unit, norm, error_norm, row_unit, row_p, row_q):
    """Return lower and upper bounds of the pre-activation, in units of the row (docs/numerics.md#certified-float32)."""
    product = raw * unit
    centre = product + bias * row_unit
    slack = norm * row_p + error_norm * row_q
    slack += tl.abs(product) * 0.0009765625 + tl.abs(bias * row_unit) * 2.4e-7 + unit * 6e-8 + 1e-36
    slack = tl.where(row_q == 0.0, 0.0, slack * 1.001)  # a token of zeros: the bias, exactly
    return centre - slack, centre + slack


@triton.jit
def _magnitudes(low, high):
    """Return bounds of the absolute value of what lies between `low` and `high`; without these, of anything."""
    return tl.where(low > 0.0, low, tl.where(high < 0.0, -high, 0.0)), tl.where(high > -low, high, -low)


@triton.jit
def _scaled(low, high, scale):
    """Multiply bounds by a scale of at least 0, rounding outwards: among the smallest numbers by as much as is lost."""
    lost = tl.where(scale > 0.0, 1.2e-38, 0.0)
    down = tl.abs(low * scale) * 2.4e-7 + tl.where(low != 0.0, lost, 0.0)
    up = tl.abs(high * scale) * 2.4e-7 + tl.where(high != 0.0, lost, 0.0)
    return low * scale - down, high * scale + up


@triton.jit
def _group_keys(values, there, inside):
    """Return the key of the largest value of each group; NaN counts as infinite."""
    values = tl.where(values != values, float("inf"), values)
    keys = _to_key(tl.max(tl.where(there, values, float("-inf")), axis=1), KEY_NAN)
    return tl.where(inside, keys, KEY_NONE)


@triton.jit
def encode_topk_center_kernel(
    x_ptr,  # [B, d]
    bias_ptr,  # [d]
    out_ptr,  # [B, d]
    B,
    d,
    x_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x - bias, computed in float32 and rounded once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < B)[:, None] & (column < d)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < d, other=0.0).to(tl.float32)
    out = (x - bias[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * d + column[None, :], out, mask=inside)


@triton.jit
def encode_topk_group_max_kernel(
    raw_ptr,  # [rows, stride] products x @ W_enc_T.T
    bias_ptr,  # [n]
    scale_ptr,  # [n] or None
    column_ptr,  # [3, n] unit, norm and error norm of each latent, or None
    row_ptr,  # [3, rows] unit, p and q of each token, or None
    low_ptr,  # [rows, groups] largest key (certified: of the lower bounds) of each group
    high_ptr,  # [rows, groups] of the upper bounds, or None
    super_ptr,  # [rows, supers] largest of SUPER groups of low_ptr, or None
    rows,
    n,
    groups,
    supers,
    raw_stride,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    MAGNITUDE: tl.constexpr,  # whether keys are those of absolute values
):
    """Reduce groups of consecutive latents to their largest key: the one pass over all pre-activations."""
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    latents = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = latents < n
    bias = tl.load(bias_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    if column_ptr is not None:
        unit = tl.load(column_ptr + latents, mask=inside, other=0.0)
        norm = tl.load(column_ptr + n + latents, mask=inside, other=0.0)
        error_norm = tl.load(column_ptr + 2 * n + latents, mask=inside, other=0.0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + latents, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * BLOCK_B
    for step in tl.range(0, tl.minimum(BLOCK_B, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + step
        raw = tl.load(raw_ptr + row * raw_stride + latents, mask=inside, other=0.0).to(tl.float32)
        out = row * groups + group
        if column_ptr is not None:
            low, high = _bounds(
                raw, bias, unit, norm, error_norm,
                tl.load(row_ptr + row), tl.load(row_ptr + rows + row), tl.load(row_ptr + 2 * rows + row),
            )  # fmt: skip
            if MAGNITUDE:
                low, high = _magnitudes(low, high)
            if scale_ptr is not None:
                low, high = _scaled(low, high, scale)
            # a latent without bounds is a candidate, and is no reason to pass over others
            low = tl.where(low != low, float("-inf"), low)
            tl.store(high_ptr + out, _group_keys(high, inside, group < groups), mask=group < groups)
            keys = _group_keys(low, inside, group < groups)
        else:
            value = raw + bias
            if scale_ptr is not None:
                value = value * scale
            if MAGNITUDE:
                value = tl.abs(value)
            keys = _group_keys(value, inside, group < groups)
        tl.store(low_ptr + out, keys, mask=group < groups)
        if super_ptr is not None:
            place = tl.program_id(0) * (BLOCK_G // SUPER) + tl.arange(0, BLOCK_G // SUPER)
            above = tl.max(tl.reshape(keys, [BLOCK_G // SUPER, SUPER]), axis=1)
            tl.store(super_ptr + row * supers + place, above, mask=place < supers)


@triton.jit
def _write_groups(keys_ptr, low_ptr, tau, room, list_ptr, groups, capacity, BLOCK: tl.constexpr):
    """List the groups whose key exceeds tau, and the first `room` of those that equal it. Return how many there are.

    With low_ptr, keys are upper bounds; only those groups count as equal of which a lower bound equals tau too.
    """
    found = 0
    ties = 0
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + group, mask=group < groups, other=KEY_NONE)
        tied = (keys == tau) & (group < groups)
        chosen = keys > tau
        if low_ptr is not None:
            exact = tl.load(low_ptr + group, mask=group < groups, other=KEY_NONE) == tau
            chosen |= tied & (exact == 0)
            tied &= exact
        chosen |= tied & (ties + tl.cumsum(tied.to(tl.int32)) <= room)
        position = found + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(list_ptr + position, group, mask=chosen & (position < capacity))
        found += tl.sum(chosen.to(tl.int32))
        ties += tl.sum(tied.to(tl.int32))
    return found


@triton.jit
def _members(
    items_ptr, start, count, source_ptr, n, bias_ptr, scale_ptr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Return the members of PIECE items and their keys: groups of supers if keys are the source, else latents."""
    slot = start + tl.arange(0, PIECE)
    item = tl.load(items_ptr + slot, mask=slot < count, other=0)
    member = item[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (slot < count)[:, None] & (member < n)
    if source_ptr.dtype.element_ty == tl.int32:
        keys = tl.load(source_ptr + member, mask=inside, other=KEY_NONE)
    else:
        keys = _keys_of(_pre_acts(source_ptr, bias_ptr, member, inside), member, inside, scale_ptr, MAGNITUDE)
    return member, keys


@triton.jit
def _append(list_ptr, found, member, chosen, capacity):
    """Write the chosen members behind the first `found`, row by row; return how many there are now."""
    chosen = chosen.to(tl.int32)
    counts = tl.sum(chosen, axis=1)
    position = found + (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(chosen, axis=1) - 1
    tl.store(list_ptr + position, member, mask=(chosen != 0) & (position < capacity))
    return found + tl.sum(counts)


@triton.jit
def _narrow(
    items_ptr, list_ptr, k, low, source_ptr, n, bias_ptr, scale_ptr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, SHORT: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """List, in ascending order, SHORT or fewer members of k items, the k largest among them.

    At least k members reach `low`, and as a rule few more: those are listed. If they are too many, which only ties
    bring about, exactly k are. Return how many, and a key that they reach.
    """
    found = 0
    high = KEY_NONE
    for start in range(0, k, PIECE):
        member, keys = _members(items_ptr, start, k, source_ptr, n, bias_ptr, scale_ptr, WIDTH, PIECE, MAGNITUDE)
        found = _append(list_ptr, found, member, keys >= low, SHORT)
        high = tl.maximum(high, tl.max(keys))
    if found > SHORT:
        room = k
        while low < high:
            middle = _middle(low, high)
            count = 0
            above = KEY_NAN
            below = KEY_NONE
            for start in range(0, k, PIECE):
                _, keys = _members(items_ptr, start, k, source_ptr, n, bias_ptr, scale_ptr, WIDTH, PIECE, MAGNITUDE)
                part_count, part_above, part_below = _split(keys, middle)
                count, above, below = count + part_count, tl.minimum(above, part_above), tl.maximum(below, part_below)
            room = tl.where(count < k, k - count, tl.where(count == k, k, room))
            high = tl.where(count > k, high, tl.where(count == k, above, below))
            low = tl.where(count >= k, above, low)
        found = 0
        ties = 0
        for start in range(0, k, PIECE):
            member, keys = _members(items_ptr, start, k, source_ptr, n, bias_ptr, scale_ptr, WIDTH, PIECE, MAGNITUDE)
            tied = (keys == low).to(tl.int32)
            counts = tl.sum(tied, axis=1)
            earlier = ties + (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(tied, axis=1)
            found = _append(list_ptr, found, member, (keys > low) | ((tied != 0) & (earlier <= room)), SHORT)
            ties += tl.sum(counts)
    tl.debug_barrier()  # other threads read the list
    return found, low


@triton.jit
def _select_row(
    raw_row, bias_ptr, scale_ptr, max_row, super_row, list_row, other_row, acts_row, indices_row, n, k, groups, supers,
    GROUP: tl.constexpr, SUPER: tl.constexpr, BLOCK_S: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Choose k sets of groups, among these k groups, among these k latents; each time the first of equal ones.

    What is chosen at one level bounds the k-th largest of the next. Little is held at once, so that many programs fit.
    """
    tau, room = _kth_key_in_memory(super_row, supers, k, BLOCK_S)
    _write_groups(super_row, None, tau, room, list_row, supers, SHORT, BLOCK_S)
    tl.debug_barrier()  # the list was written by other threads
    slot = tl.arange(0, SHORT)
    if SUPER > 1:
        PIECE_S: tl.constexpr = min(SHORT, TILE // SUPER)
        found, tau = _narrow(list_row, other_row, k, tau, max_row, groups, None, None, SUPER, PIECE_S, SHORT, False)
        group = tl.load(other_row + slot, mask=slot < found, other=0)
        if found > k:
            keys = tl.load(max_row + group, mask=slot < found, other=KEY_NONE)
            tau = _kth_key(keys, k, tau)
            chosen, position = _choose(keys, k, tau)
            tl.store(list_row + position, group, mask=chosen)
        else:
            tl.store(list_row + slot, group, mask=slot < found)
        tl.debug_barrier()
    PIECE_G: tl.constexpr = min(SHORT, TILE // GROUP)
    found, tau = _narrow(list_row, other_row, k, tau, raw_row, n, bias_ptr, scale_ptr, GROUP, PIECE_G, SHORT, MAGNITUDE)
    latents = tl.load(other_row + slot, mask=slot < found, other=0)
    values = _pre_acts(raw_row, bias_ptr, latents, slot < found)
    keys = _keys_of(values, latents, slot < found, scale_ptr, MAGNITUDE)
    tau = _kth_key(keys, k, tau)
    _write_selection(keys, latents, values, k, tau, acts_row, indices_row)


@triton.jit
def encode_topk_select_kernel(
    raw_ptr,  # [rows, stride]
    bias_ptr,  # [n]
    scale_ptr,  # [n] or None
    max_ptr,  # [rows, groups] from encode_topk_group_max_kernel
    super_ptr,  # [rows, supers] from there
    list_ptr,  # [rows, 2, SHORT] scratch
    top_acts_ptr,  # [rows, k]
    top_indices_ptr,  # [rows, k]
    n,
    k,
    groups,
    supers,
    raw_stride,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Select from each row by its groups; how is said in `_select_row`."""
    row = tl.program_id(0).to(tl.int64)
    _select_row(
        raw_ptr + row * raw_stride, bias_ptr, scale_ptr, max_ptr + row * groups, super_ptr + row * supers,
        list_ptr + 2 * row * SHORT, list_ptr + (2 * row + 1) * SHORT, top_acts_ptr + row * k, top_indices_ptr + row * k,
        n, k, groups, supers, GROUP, SUPER, BLOCK_S, SHORT, TILE, MAGNITUDE,
    )  # fmt: skip


@triton.jit
def encode_topk_whole_kernel(
    raw_ptr,  # [rows, stride]
    bias_ptr,  # [n]
    scale_ptr,  # [n] or None
    list_ptr,  # [rows, k] int32 scratch; may be the memory of top_acts_ptr
    top_acts_ptr,  # [rows, k]
    top_indices_ptr,  # [rows, k]
    n,
    k,
    raw_stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Choose k of a row that is held at once, for rows of which groups would leave out little."""
    row = tl.program_id(0).to(tl.int64)
    raw_row = raw_ptr + row * raw_stride
    latents = tl.arange(0, BLOCK)
    inside = latents < n
    keys = _keys_of(_pre_acts(raw_row, bias_ptr, latents, inside), latents, inside, scale_ptr, MAGNITUDE)
    tau = _kth_key_of_row(keys, k, tl.min(tl.where(inside, keys, KEY_NAN)))
    chosen, position = _choose(keys, k, tau)
    # listed and read back: values would take up registers meanwhile, and scattering both results once more as many
    list_row = list_ptr + row * k
    tl.store(list_row + position, latents, mask=chosen)
    tl.debug_barrier()  # other threads read the list
    slot = tl.arange(0, BLOCK_K)
    latents = tl.load(list_row + slot, mask=slot < k, other=0)
    values = _pre_acts(raw_row, bias_ptr, latents, slot < k)
    tl.debug_barrier()  # the list may lie where results go
    _write_chosen(slot < k, slot, latents, values, top_acts_ptr + row * k, top_indices_ptr + row * k)

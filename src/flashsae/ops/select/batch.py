"""Allocate and launch the selection of the B·k largest: what it lists, part by part, and how it chooses from that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae import distributed
from flashsae.ops.encode import kernels as encode_kernels
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import Layout
from flashsae.ops.encode.product import Memory, Part
from flashsae.ops.select import kernels, list_kernels, redo_kernels
from flashsae.ops.select.operands import PROGRAMS, Operands, bounds_of, rescore

FINE = 13
"""Bins of the first histogram are 2 ** FINE keys wide: 16384 of them cover a factor of 65536 above the bound."""

BINS = kernels.BINS.value
BLOCK_G, TILE, WARPS = 512, 128, 1
"""Of programs over pieces of a row, as measured (LOG.md): groups looked at, latents at once, warps."""


@dataclass(frozen=True)
class _List:
    """What may be selected, and the bound that rises.

    Args:
        layout: how latents are grouped.
        wanted: B·k.
        capacity: entries that fit.
        chunks: pieces of a row.
        keys: [capacity], int32; certified: of lower bounds, then of rescored values.
        other: [capacity], float32 values; certified: int32 keys of upper bounds.
        latents: [capacity], int32.
        tokens: [capacity], int32, if certified.
        begins: [B + 1], int32: where the entries of a token begin.
        used: [parts + 1], int64: entries wanted before each part, whether they fit or not, and behind the last.
        state: [4], int64: the bound, the logarithm of the width of a bin, how many keys lie above the bound's bin, and
            whether that is one key.
        redo_state, redo_histogram: [4] and [BINS + 1], int64: the same for the way out.
        histograms: [2, BINS + 1], int32: of maxima by their top bits, and of keys above the bound.
    """

    layout: Layout
    wanted: int
    capacity: int
    chunks: int
    keys: Tensor
    other: Tensor
    latents: Tensor
    tokens: Tensor | None
    begins: Tensor
    used: Tensor
    state: Tensor
    redo_state: Tensor
    redo_histogram: Tensor
    histograms: Tensor

    @property
    def total(self) -> Tensor:
        """[1], int64: entries wanted in all."""
        return self.used[-1:]

    @classmethod
    def of(cls, operands: Operands, k: int) -> _List:
        """Return an empty list for the B·k largest."""
        (B, n), device = (len(operands.x), len(operands.W)), operands.x.device
        # so many maxima that already those of the first part tell a good bound, although norms of tokens differ
        layout = Layout.of(n, min(n, k * max(2, operands.parts)))
        capacity = capacity_of(B, n, k, operands)
        chunks = triton.cdiv(layout.groups, _block_g(layout))

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        sizes = [operands.parts + 1, 4, 4, BINS + 1, BINS + 1]
        zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=device)  # one launch for all of them
        used, state, redo_state, redo_histogram, histograms = torch.split(zeros, sizes)
        other = empty(capacity, dtype=torch.int32 if operands.certified else torch.float32)
        return cls(
            layout, B * k, capacity, chunks, empty(capacity), other, empty(capacity),
            empty(capacity) if operands.certified else None, empty(B + 1),
            used, state, redo_state, redo_histogram, histograms.view(torch.int32).view(2, BINS + 1),
        )  # fmt: skip


def capacity_of(B: int, n: int, k: int, operands: Operands) -> int:
    """Return how many candidates fit.

    Of shuffled rows part p brings about B·k / p that belong to the largest so far, beside ties and bins that are not
    cut, and in certified float32 those that the error may lift above the bound.
    """
    parts = operands.parts
    shares = min(parts, 2 + math.log2(parts))
    factor = 16.0 + 2.0 * (shares - 1) if operands.certified else 1.25 * shares
    return min(B * n, 1024 + math.ceil(factor * B * k))


def batch_topk(
    centred: Tensor,
    W_enc_T: Tensor,
    keys: Keys,
    k: int,
    precision: str,
    memory: Memory,
    used: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents [B·k], int32, starts [B + 1], int32, and values [B·k], float32, as the reference does.

    Args:
        centred: [B, d_in].
        precision: of the product.
        memory: bounds of what exists at once.
        used: [1], int64; receives how many candidates there were.
        noise: as of `launch_encode_topk`.
    """
    B, wanted, device = len(centred), len(centred) * k, centred.device
    latents = torch.empty(wanted, dtype=torch.int32, device=device)
    values = torch.empty(wanted, dtype=torch.float32, device=device)
    starts = (torch.empty if B else torch.zeros)(B + 1, dtype=torch.int32, device=device)
    if B:
        operands = Operands.of(centred, W_enc_T, keys, precision, memory, noise)
        candidates = _List.of(operands, k)
        for number, part in enumerate(operands.product.parts()):
            _add_part(operands, candidates, number, part)
        _choose(operands, candidates, (starts, latents, values))
        if used is not None:
            used.copy_(candidates.total)
    return latents, starts, values


def _block_g(layout: Layout) -> int:
    """Return how many groups a program looks at."""
    return int(min(BLOCK_G, triton.next_power_of_2(layout.groups)))  # one long token must not be waited for


def _count_maxima(maxima: Tensor, hist: Tensor, state: Tensor, tokens: Tensor | None) -> None:
    n, block = maxima.numel(), 4096
    kernels.select_histogram_kernel[(min(PROGRAMS, triton.cdiv(n, block)),)](
        maxima, None, n, hist, state, tokens, maxima.shape[1], COARSE=True, BLOCK=block, num_warps=8
    )


def _count_entries(of: _List, used: Tensor) -> None:
    n = of.capacity
    kernels.select_histogram_kernel[(min(PROGRAMS, triton.cdiv(n, 512)),)](
        of.keys, used, n, of.histograms[1], of.state, None, 1, COARSE=False, BLOCK=512, num_warps=4
    )


def _raise_bound(of: _List, hist: Tensor, next_shift: int = -1, *, coarse: bool = False) -> None:
    kernels.select_bound_kernel[(1,)](
        distributed.summed(hist), of.state, of.state, of.total, of.capacity, of.wanted, next_shift,
        COARSE=coarse, ONLY_REDO=False, num_warps=16,
    )  # fmt: skip
    if not coarse:
        hist.zero_()  # that of top bits is added to


def _add_part(operands: Operands, to: _List, number: int, part: Part) -> None:
    """Raise the bound by what these rows hold, and list what of them reaches it."""
    products = part.products
    layout, rows, n, device = to.layout, len(products), len(operands.W), products.device
    coarse, fine = to.histograms
    by = products, *operands.by, *bounds_of(part)
    maxima, supers = _group_maxima(operands, layout, part)
    _count_maxima(supers, coarse, to.state, bounds_of(part)[1])
    _raise_bound(to, coarse, FINE, coarse=True)
    grid, pieces = (rows, to.chunks), rows * to.chunks
    # each program of the last pass adds up as many counts of pieces as sums of counts, or up to twice as many
    span = max(128, triton.next_power_of_2(math.isqrt(pieces)))
    spans = triton.cdiv(pieces, span)
    counts, reach = torch.empty(2, pieces, dtype=torch.int32, device=device)
    sums, used = torch.zeros(spans, dtype=torch.int64, device=device), to.used[number : number + 2]
    shape = rows, n, layout.groups, to.chunks, products.stride(0)
    tile = {
        "GROUP": layout.group, "BLOCK_G": _block_g(layout), "TILE": TILE, "MAGNITUDE": operands.keys.magnitude,
        "num_warps": WARPS,
    }  # fmt: skip
    kernels.select_groups_kernel[grid](*by, maxima, counts, fine, to.state, *shape, **tile)
    if number:
        _count_entries(to, used)
    # certified: values, which lie above their lower bounds, are counted in bins of the same width next
    _raise_bound(to, fine, FINE if operands.certified else -1)
    kernels.select_reach_kernel[grid](*by, maxima, counts, to.state, reach, sums, *shape, SPAN=span, **tile)
    kernels.select_append_kernel[grid](
        *by, maxima, counts, to.state, reach, sums, used, to.keys, to.other, to.latents, to.tokens, to.begins,
        part.tokens.start, to.capacity, *shape, SPAN=span, SPANS=triton.next_power_of_2(spans), **tile,
    )  # fmt: skip


def _group_maxima(operands: Operands, layout: Layout, part: Part) -> tuple[Tensor, Tensor]:
    """Return the largest keys of groups, certified: of upper bounds, and of supers, certified: of lower bounds."""
    products = part.products
    rows, groups, device = len(products), layout.groups, products.device
    low = torch.empty(rows, groups, dtype=torch.int32, device=device)
    high = torch.empty_like(low) if operands.certified else None
    supers = torch.empty(rows, layout.supers, dtype=torch.int32, device=device)
    block_g = max(layout.super, triton.next_power_of_2(min(groups, 2048 // layout.group)))
    block_b = 16
    encode_kernels.encode_topk_group_max_kernel[(triton.cdiv(groups, block_g), triton.cdiv(rows, block_b))](
        products, *operands.by, *bounds_of(part), low, high, supers,
        rows, len(operands.W), groups, layout.supers, products.stride(0),
        GROUP=layout.group, SUPER=layout.super, BLOCK_G=block_g, BLOCK_B=block_b,
        STAGES=1 if operands.certified else 3, MAGNITUDE=operands.keys.magnitude,
        num_warps=8 if operands.certified else 4,
    )  # fmt: skip
    return low if high is None else high, supers


def _choose(operands: Operands, of: _List, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Choose the B·k largest of the list, or anew if it is incomplete; `out`: starts, latents, values."""
    B, device, fine = len(operands.x), operands.x.device, of.histograms[1]
    starts, latents, values = out
    entry_values = _rescore(operands, of) if operands.certified else of.other
    # one pass closes the bound's bin, unless all keys lay beyond the last bin: then it takes two more
    for _ in range(4 if operands.certified else 3):
        _count_entries(of, of.total)
        _raise_bound(of, fine)
    redo = _Redo(operands, of, out)
    redo.find_bound()
    counts = torch.empty(2, B, dtype=torch.int64, device=device)
    list_kernels.select_count_kernel[(B,)](
        of.keys, of.begins, of.state, of.total, counts, of.capacity, B, BLOCK=128, num_warps=1
    )
    redo.run(redo_kernels.COUNT.value, of.state, counts)
    list_kernels.select_starts_kernel[(1,)](
        counts, of.state, starts, B, of.wanted, BLOCK=min(8192, max(32, triton.next_power_of_2(B))), num_warps=16
    )
    list_kernels.select_write_kernel[(B,)](
        of.keys, entry_values, of.latents, of.begins, of.state, of.total, counts, starts, latents, values,
        of.capacity, B, BLOCK=128, num_warps=1,
    )  # fmt: skip
    redo.run(redo_kernels.WRITE.value, of.state, counts)


def _rescore(operands: Operands, of: _List) -> Tensor:
    """Return values in float32 of what may be selected, and set their keys."""
    values = torch.empty(of.capacity, dtype=torch.float32, device=of.keys.device)
    rescore(operands, (of.latents, of.tokens, of.total), values, (of.other, of.state, of.keys))
    return values


@dataclass(frozen=True)
class _Redo:
    """The way out: launches that leave at once unless the list is incomplete."""

    operands: Operands
    of: _List
    out: tuple[Tensor, Tensor, Tensor]

    def find_bound(self) -> None:
        """Set the bound to the B·k-th largest key of all, by its top bits, by those behind them, and by the last."""
        of, state, hist = self.of, self.of.redo_state, self.of.redo_histogram
        for result in (state, state, of.state):
            self.run(redo_kernels.HISTOGRAM.value, state, None, hist)
            kernels.select_bound_kernel[(1,)](
                hist, state, result, of.total, of.capacity, of.wanted, -1,
                COARSE=False, ONLY_REDO=True, num_warps=16,
            )  # fmt: skip

    def run(self, mode: int, state: Tensor, counts: Tensor | None, hist: Tensor | None = None) -> None:
        """Do one pass over all pre-activations."""
        operands, (starts, latents, values) = self.operands, self.out
        x, W = operands.x, operands.W
        B, d = x.shape
        redo_kernels.select_redo_kernel[(triton.cdiv(B, 16),)](
            x, W, *operands.by, state, self.of.total, hist, counts, starts, latents, values,
            self.of.capacity, B, len(W), d, x.stride(0), W.stride(0),
            MODE=mode, BLOCK_B=16, BLOCK_N=128, BLOCK_D=32, MAGNITUDE=operands.keys.magnitude,
            ROUNDED=x.dtype == torch.bfloat16 and not operands.certified, num_warps=4,
        )  # fmt: skip

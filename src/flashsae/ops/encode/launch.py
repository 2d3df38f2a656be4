"""Allocate and launch: a matrix product a bounded number of tokens at a time, and the selection behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.backend import log_once
from flashsae.ops.decode.launch import launch_dots
from flashsae.ops.dense.op import pre_acts
from flashsae.ops.encode import certify_kernels, kernels, screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout as Layout
from flashsae.ops.encode.layout import tile_and_warps
from flashsae.ops.encode.onesided import OneSided
from flashsae.ops.encode.product import Memory, Part, Product
from flashsae.ops.encode.redo import no_rows, redo_rows
from flashsae.ops.validate import packed, rows_contiguous

LARGEST_K = 1024
"""Latents a token that a program selects at most: as many as it holds in registers. For more, rows are sorted."""

WHOLE_ROW = 8192
"""Latents of a row that a program of the selection holds at once, at most."""


@dataclass(frozen=True)
class _Selection:
    """What latents are selected by, and how many.

    Args:
        keys: what they are selected by, packed.
        layout: k, and how latents are grouped.
        n: d_sae.
    """

    keys: Keys
    layout: Layout
    n: int

    @property
    def by(self) -> tuple[Tensor, Tensor | None]:
        """Bias and scale, as kernels take them."""
        return self.keys.b_enc, self.keys.scale


def launch_center(x: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x - b_dec, [B, d_in]."""
    x, b_dec = rows_contiguous(x), packed(b_dec)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        (B, d), block_d = x.shape, min(1024, triton.next_power_of_2(x.shape[1]))
        kernels.encode_topk_center_kernel[(triton.cdiv(B, 4), triton.cdiv(d, block_d))](
            x, b_dec, out, B, d, x.stride(0), BLOCK_B=4, BLOCK_D=block_d, num_warps=4
        )
    return out


def _sorted_topk(
    x: Tensor, W_enc_T: Tensor, keys: Keys, k: int, precision: str, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Do `launch_encode_topk` for any k, without a wait for the device: a stable sort has the lowest of ties first."""
    acts = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    # of a latent: pre-activation, key, and what a sort reads and writes, a number and a place each
    step = max(1, workspace_bytes // (len(W_enc_T) * 32))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        values = pre_acts(x[part], W_enc_T, keys.b_enc, precision)
        order = keys.of(values).sort(dim=1, descending=True, stable=True).indices
        indices[part] = order[:, :k].sort(dim=1).values
        acts[part] = values.gather(1, indices[part])
    return acts, indices


def screened_k(n: int, k: int) -> int | None:
    """Return k where upper bounds of groups alone tell the k largest of n latents, as a screen wants it, else None."""
    return k if k <= LARGEST_K and Layout.of(n, k).group == screen.GROUP else None


def launch_encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    keys: Keys,
    k: int,
    precision: str,
    memory: Memory,
    candidate_counts: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k pre-activations of each token that have the largest keys, and their indices.

    Args:
        x: [B, d_in], already centred.
        precision: of the product.
        memory: bounds of what exists at once.
        candidate_counts: [B], int32; receives how many latents of each token were rescored, if certified.
        noise: scalar, int64: seed of what an 8-bit screen is rounded with.
    """
    if k > LARGEST_K:
        log_once(f"more than {LARGEST_K} latents a token are selected by sorting all its pre-activations, slowly")
        return _sorted_topk(x, W_enc_T, keys, k, precision, memory[0])
    B, n, device = len(x), len(W_enc_T), x.device
    acts = torch.empty(B, k, dtype=torch.float32, device=device)
    indices = torch.empty(B, k, dtype=torch.int64, device=device)
    if B == 0:
        return acts, indices
    selection = _Selection(keys.packed(), Layout.of(n, k), n)
    known = screened_k(n, k)
    by_groups = None if known is None else selection.keys
    product = Product.of(x, W_enc_T, precision, memory, noise=noise, keys=by_groups, k=known)
    counts = torch.empty(B, dtype=torch.int32, device=device) if candidate_counts is None else candidate_counts
    one_sided = OneSided(product.x, product.W, selection.keys, selection.layout, (acts, indices), counts)
    for part in product.parts():
        out = acts[part.tokens], indices[part.tokens]
        if part.screened is not None:
            one_sided.add(part)
        elif part.bounds is None:
            _select(selection, part.products, out)
        else:
            _select_certified(selection, product, part, out, counts[part.tokens])
    del part  # its memory is free for what follows
    one_sided.finish()
    return acts, indices


def count_open(
    x: Tensor, W_enc_T: Tensor, keys: Keys, k: int, precision: str, memory: Memory, noise: Tensor | None
) -> Tensor:
    """Return how many latents of each token are rescored behind a screen, d_sae of one that is done as a whole.

    Args:
        x, W_enc_T, keys, k, memory, noise: as in `launch_encode_topk`.
        precision: one with a screen, which is there whether it pays or not.
    Returns:
        [B], int32; k of each where no device could have a screen for such rows.
    """
    counts = torch.full((len(x),), k, dtype=torch.int32, device=x.device)
    with screen.always():
        launch_encode_topk(x, W_enc_T, keys, k, precision, memory, counts, noise)
    return counts


def _group_max(selection: _Selection, products: Tensor, facts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the largest keys of groups and supers; certified: of lower and of upper bounds of groups."""
    layout, device = selection.layout, products.device
    rows, groups = len(products), layout.groups
    low = torch.empty(rows, groups, dtype=torch.int32, device=device)
    other = torch.empty(rows, groups if facts else layout.supers, dtype=torch.int32, device=device)
    columns, tokens = facts or (None, None)
    block_g = max(layout.super, triton.next_power_of_2(min(groups, 2048 // layout.group)))
    block_b = 16
    kernels.encode_topk_group_max_kernel[(triton.cdiv(groups, block_g), triton.cdiv(rows, block_b))](
        products, *selection.by, columns, tokens,
        low, other if facts else None, None if facts else other,
        rows, selection.n, groups, layout.supers, products.stride(0),
        GROUP=layout.group, SUPER=layout.super, BLOCK_G=block_g, BLOCK_B=block_b, STAGES=1 if facts else 3,
        MAGNITUDE=selection.keys.magnitude, num_warps=8 if facts else 4,
    )  # fmt: skip
    return low, other


def _select(selection: _Selection, products: Tensor, out: tuple[Tensor, Tensor]) -> None:
    if selection.n <= min(WHOLE_ROW, 8 * selection.layout.k):  # as measured (LOG.md)
        _select_from_rows(selection, products, out)
    else:
        _select_by_groups(selection, products, out)


def _select_from_rows(selection: _Selection, products: Tensor, out: tuple[Tensor, Tensor]) -> None:
    n, k = selection.n, selection.layout.k
    block = max(32, triton.next_power_of_2(n))
    kernels.encode_topk_whole_kernel[(len(products),)](
        products, *selection.by, out[0].view(torch.int32), *out,
        n, k, products.stride(0), BLOCK=block, BLOCK_K=triton.next_power_of_2(k),
        MAGNITUDE=selection.keys.magnitude, num_warps=max(1, block // 1024),
    )  # fmt: skip


def _select_by_groups(selection: _Selection, products: Tensor, out: tuple[Tensor, Tensor]) -> None:
    layout, rows = selection.layout, len(products)
    maxima, supers = _group_max(selection, products, None)
    short = max(64, 2 * triton.next_power_of_2(layout.k))
    scratch = torch.empty(rows, 2, short, dtype=torch.int32, device=products.device)
    tile, warps = tile_and_warps(layout.k)
    kernels.encode_topk_select_kernel[(rows,)](
        products, *selection.by, maxima, supers, scratch, *out,
        selection.n, layout.k, layout.groups, layout.supers, products.stride(0),
        GROUP=layout.group, SUPER=layout.super, BLOCK_S=layout.block_s, SHORT=short, TILE=tile,
        MAGNITUDE=selection.keys.magnitude, num_warps=warps,
    )  # fmt: skip


def _select_certified(
    selection: _Selection, product: Product, part: Part, out: tuple[Tensor, Tensor], counts: Tensor
) -> None:
    """Select among rescored candidates; write how many each token had to `counts`."""
    assert part.bounds is not None
    x, W_enc_T, products, (tokens, latents) = product.x[part.tokens], product.W, part.products, part.bounds
    by, magnitude = selection.by, selection.keys.magnitude
    layout, rows, n = selection.layout, len(products), selection.n
    k, capacity = layout.k, layout.capacity
    low, high = _group_max(selection, products, (latents, tokens))
    chosen = torch.empty(rows, capacity, dtype=torch.int32, device=x.device)
    candidates, todo = torch.empty_like(chosen), no_rows(rows, x.device)
    certify_kernels.encode_topk_candidates_kernel[(rows,)](
        products, *by, latents, tokens, low, high, chosen, candidates, counts, todo,
        rows, n, k, layout.groups, products.stride(0),
        GROUP=layout.group, BLOCK_G=layout.block_g, CAPACITY=capacity, MAGNITUDE=magnitude,
        num_warps=4 if capacity <= 1024 else 8,
    )  # fmt: skip
    dots = launch_dots(x, candidates, W_enc_T, counts=counts)
    certify_kernels.encode_topk_finish_kernel[(rows,)](
        dots, candidates, counts, *by, *out, todo, n, k,
        CAPACITY=capacity, MAGNITUDE=magnitude, num_warps=4 if capacity <= 1024 else 8,
    )  # fmt: skip
    redo_rows(x, W_enc_T, selection.keys, k, todo, out)

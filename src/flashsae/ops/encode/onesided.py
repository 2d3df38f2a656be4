"""The exact k of each token from upper bounds of all keys: few latents are rescored.

Keys are ordered by value, and of equal ones the lowest latent comes first; NaN is the largest key. Let e_j be the key
of latent j and u_j >= e_j its bound. The k latents of the largest bounds, of equal ones the lowest, are rescored: F.
Let τ be the smallest key in F, and i the last latent of F that has it.

*Which others may be selected.* All k of F come before a latent j outside of F if e_j < τ, or if e_j = τ and j > i: then
j is not selected. So if j is, either e_j > τ, whence u_j > τ; or e_j = τ and j < i, whence u_j > τ, or u_j = τ and
j < i. Those of which this holds of u_j, the extras, are rescored too. F and the extras hold the selection.

*If they are too many*, those of the largest bounds are rescored, of equal bounds the lowest latents. Let r be the
largest bound among the rest, q the first latent of the rest that has it, τ' the k-th largest key of what was rescored
and i' the last latent that is chosen with it. By the same argument none of the rest is selected unless r > τ', or
r = τ' and q < i'. Only a row of which this holds is done as a whole.

So many latents whose bounds are one number and hold exactly (a token of zeros, weights of zeros, latents that are
masked by a key of minus infinity) need no list: the first of them are in F or among the extras, and all others stand
behind. A bound of infinity holds for NaN too, and counts as the largest key.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.decode.launch import launch_dots
from flashsae.ops.encode import onesided_kernels
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout, tile_and_warps
from flashsae.ops.encode.redo import redo_rows


def most_extras(k: int) -> int:
    """Return how many latents of a token are rescored at most, besides the first k."""
    return int(max(256, 2 * triton.next_power_of_2(k)))


def select_onesided(
    x: Tensor, W: Tensor, keys: Keys, layout: Layout, upper: Tensor, maxima: Tensor, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Write the k latents of each row that have the largest keys, and their values, to `out`.

    Args:
        x: [rows, d], bfloat16 or float32.
        W: [d_sae, d], of the dtype of x. Values are float32 dot products of both, plus the bias.
        keys: what latents are selected by, packed.
        layout: k, and how latents are grouped: by 32.
        upper: [rows, d_sae or more], bfloat16: bounds of the keys, none of them NaN.
        maxima: [rows, groups], int32: `_to_key` of the largest of these bounds of each group. Overwritten.
        out: values [rows, k], float32, and latents [rows, k], int64, ascending.

    Returns:
        How many latents of each row were rescored, [rows], int32: all of them where the row was done as a whole.
    """
    rows, n, k, most = len(x), len(W), layout.k, most_extras(layout.k)
    acts, indices = out
    block_k = triton.next_power_of_2(k)
    first = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    _first(layout, upper, maxima, n, (acts, first))
    dots = launch_dots(x, first, W)
    extras = torch.empty(rows, most, dtype=torch.int32, device=x.device)
    merged = torch.empty(rows, k + most, dtype=torch.int32, device=x.device)
    counts = torch.empty(rows, dtype=torch.int32, device=x.device)
    rest = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
    onesided_kernels.encode_topk_extras_kernel[(rows,)](
        upper, maxima, acts, first, dots, keys.b_enc, keys.scale, extras, merged, counts, rest,
        n, k, layout.groups, upper.stride(0), most,
        GROUP=layout.group, BLOCK_K=block_k, BLOCK_G=1024, PIECE=512 // layout.group, MAGNITUDE=keys.magnitude,
        num_warps=1 if k <= 64 else 4,
    )  # fmt: skip
    extra_dots = launch_dots(x, extras, W, counts=counts)
    block = triton.next_power_of_2(k + most)
    onesided_kernels.encode_topk_merge_kernel[(rows,)](
        dots, extra_dots, merged, counts, rest, keys.b_enc, keys.scale, acts, indices,
        n, k, most, BLOCK=block, MAGNITUDE=keys.magnitude, num_warps=max(1, block // 256),
    )  # fmt: skip
    redo_rows(x, W, keys, k, counts, k + most, out)
    return counts


def _first(layout: Layout, upper: Tensor, maxima: Tensor, n: int, out: tuple[Tensor, Tensor]) -> None:
    """Write the k largest bounds of each row and their latents."""
    rows, k = len(upper), layout.k
    short = max(64, 2 * triton.next_power_of_2(k))
    scratch = torch.empty(rows, 2, short, dtype=torch.int32, device=upper.device)
    supers = None
    if layout.super > 1:
        supers = torch.empty(rows, layout.supers, dtype=torch.int32, device=upper.device)
    tile, warps = tile_and_warps(k)
    onesided_kernels.encode_topk_first_kernel[(rows,)](
        upper, maxima, supers, scratch, *out, n, k, layout.groups, layout.supers, upper.stride(0),
        GROUP=layout.group, SUPER=layout.super, BLOCK_S=layout.block_s, SHORT=short, TILE=tile,
        PIECE=max(1, 1024 // layout.super), num_warps=warps,
    )  # fmt: skip

"""Rows of which too many latents would have to be rescored: done as a whole, in float32."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashsae.ops.encode import redo_kernels
from flashsae.ops.encode.keys import Keys

PROGRAMS = 128
"""Programs that share the rows."""

ROWS = 4
"""Rows that a program does at once, so that weights are read less often."""

PIECES = 32
"""Into how many pieces the latents of a row are cut at most, where rows are few."""

SLOTS = 2048
"""Pieces of rows that results are kept of. Of more rows than half of that, all latents are one piece."""


def no_rows(rows: int, device: torch.device) -> Tensor:
    """Return an empty list of some of the rows, for `note_row`."""
    return torch.zeros(1 + rows, dtype=torch.int32, device=device)


def redo_rows(x: Tensor, W: Tensor, keys: Keys, k: int, todo: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Select from all latents of the rows on a list, and write that to `out`.

    Args:
        x: [rows, d].
        W: [d_sae, d].
        keys: what latents are selected by, packed.
        k: how many are.
        todo: [1 + rows], int32: how many rows, and which.
        out: values [rows, k] and latents [rows, k].
    """
    n, d, device, block_k = len(W), x.shape[1], x.device, triton.next_power_of_2(k)
    chunk = min(4096, max(256, 4 * block_k, triton.next_power_of_2(triton.cdiv(n, PIECES))))
    programs = min(PROGRAMS, triton.cdiv(len(x), ROWS) * PIECES)
    scratch = torch.empty(2, programs, ROWS, block_k + chunk, dtype=torch.int32, device=device)
    best = torch.empty(ROWS + 1, programs, block_k, dtype=torch.int32, device=device)
    found = torch.empty(3, SLOTS, k, dtype=torch.int32, device=device)
    parts = found[0], found[1], found[2].view(torch.float32)
    redo_kernels.encode_topk_redo_kernel[(programs,)](
        x, W, todo, keys.b_enc, keys.scale, scratch[0], scratch[1].view(torch.float32), best, best[ROWS], *parts, *out,
        n, d, k, SLOTS, x.stride(0), W.stride(0),
        ROWS=ROWS, CHUNK=chunk, MOST=PIECES, BLOCK_N=32, BLOCK_D=min(128, triton.next_power_of_2(d)), BLOCK_G=2048,
        BLOCK_K=block_k, STAGES=3, MAGNITUDE=keys.magnitude, num_warps=8,
    )  # fmt: skip
    redo_kernels.encode_topk_join_kernel[(min(programs, len(x)),)](
        todo, *parts, best[ROWS], *out, k, SLOTS, MOST=PIECES, BLOCK_K=block_k, BLOCK_G=2048, num_warps=8
    )  # fmt: skip

"""Launch the latent pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flashsae.ops.adam_rows import kernels
from flashsae.ops.adam_rows.reference import AdamRule
from flashsae.ops.factors import RowGradient
from flashsae.ops.latent_rows.launch import launch_partial, packed_index
from flashsae.ops.latent_rows.reference import RUN
from flashsae.ops.validate import packed, rows_contiguous

LARGEST_ROW = 16384
"""Columns that one program holds in registers."""

SLICE = 512
"""Columns of a program that need not see the whole row: rows that it gathers stay in the cache for the others."""


def launch_adam_rows(
    weights: Tensor, low: Tensor | None, moments: tuple[Tensor, Tensor], gradient: RowGradient,
    scalars: tuple[Tensor, Tensor, Tensor], rule: AdamRule,
) -> None:  # fmt: skip
    """Do one step of Adam in place; `scalars` are lr, step and bias_correction."""
    lists, sizes = _gradient_arguments(gradient, weights)
    grid, tile = _tile(weights, rule.unit_norm)
    kernels.adam_rows_kernel[grid](
        weights, low, *moments, *lists, *packed(*scalars),
        1 - rule.beta1, rule.beta2, 1 - rule.beta2, rule.eps, rule.weight_decay,
        *sizes, UNIT_NORM=rule.unit_norm, DECOUPLED=rule.decoupled, RUN=RUN,
        BLOCK_E=4 if tile["BLOCK_D"] > 1024 else 2, **tile,
    )  # fmt: skip


def launch_row_squares(weights: Tensor, gradient: RowGradient, unit_norm: bool) -> Tensor:
    """Return the squared norm of each row of the gradient: [d_sae], float32."""
    lists, sizes = _gradient_arguments(gradient, weights)
    grid, tile = _tile(weights, whole_rows=False)
    out = torch.empty(3 if unit_norm else 1, *grid, dtype=torch.float32, device=weights.device)
    kernels.row_squares_kernel[grid](
        weights if unit_norm else None, *lists, out, len(weights), *sizes, RUN=RUN, BLOCK_E=2, **tile
    )
    if not unit_norm:
        return out[0].sum(1)
    squares, along, norms = out.sum(2).unbind(0)
    return (squares - along.square() * (2 - norms)).clamp_min(0)  # ‖g − (g·w) w‖²


def _tile(weights: Tensor, whole_rows: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid, and how many columns and warps a program has: 16 numbers of each array a thread."""
    d_sae, d = weights.shape
    block_d = triton.next_power_of_2(d)
    if not whole_rows:
        block_d = min(SLICE, block_d)
    return (d_sae, triton.cdiv(d, block_d)), {"BLOCK_D": block_d, "num_warps": max(1, block_d // 512)}


def _gradient_arguments(
    gradient: RowGradient, weights: Tensor
) -> tuple[list[Tensor | None], tuple[int | None, int, int]]:
    """Return what kernels take of a gradient: lists and rows, and the sizes k, d and stride of a row."""
    d = weights.shape[1]
    dense, slots = packed(gradient.dense, gradient.slots)
    sparse = gradient.sparse
    if sparse is None or sparse.coeffs.numel() == 0:
        return [None] * 7 + [dense, slots], (1, d, d)
    index, coeffs, rows = packed_index(sparse.index), packed(sparse.coeffs), rows_contiguous(sparse.rows)
    partial = launch_partial(index, coeffs, rows)
    lists = [index.entries, index.tokens, index.latents, index.offsets, coeffs, rows, partial, dense, slots]
    return lists, (index.k, d, rows.stride(0))

"""Norms of the rows of a weight matrix, of some columns at a time: of the decoders of each site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.factors import RowFactor
from flashsae.ops.gradients import collects
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import as_int, check_float, check_shape, compute_dtype


def block_norms(weights: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the norms of blocks of columns of each row.

        norms[i, s] = ‖weights[i, columns of block s]‖

    Args:
        weights: [d_sae, d], float.
        widths: of the blocks, in their order, which sum to d.
    Returns:
        [d_sae, blocks], float32 (float64 for float64).
    Raises:
        ShapeError, DtypeError: they do not fit each other.
    Numerics: accumulated in float32 (float64 for float64); two runs give the same bits.
    Gradients: weights (as a factor, where `collect_factors` asked for it); 0 where a norm is 0. Once differentiable.
    Cost: reads each weight once; backward reads and writes [d_sae, d] numbers.
    """
    check_shape("weights", weights, ("d_sae", "d"))
    check_float("weights", weights)
    sizes = [as_int("widths", width) for width in widths]
    if min(sizes, default=0) < 1 or sum(sizes) != weights.shape[1]:
        raise ShapeError(f"widths: expected positive numbers that sum to d = {weights.shape[1]}, got {sizes}.")
    norms: Tensor = torch.ops.flashsae.block_norms(weights, sizes)
    return norms


def _block_norms_fake(weights: Tensor, widths: list[int]) -> Tensor:
    return weights.new_empty(weights.shape[0], len(widths), dtype=compute_dtype(weights.dtype))


@operator(_block_norms_fake)
def _block_norms(weights: Tensor, widths: list[int]) -> Tensor:
    dtype = compute_dtype(weights.dtype)
    blocks = torch.split_with_sizes(weights, widths, dim=1)
    return torch.stack([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks], dim=1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, ctx.widths = inputs
    ctx.save_for_backward(weights, output)
    ctx.as_factor = collects(weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    weights, norms = ctx.saved_tensors
    slopes = torch.where(norms > 0, grad / norms, 0.0)
    blocks = torch.split_with_sizes(weights, ctx.widths, dim=1)
    rows = torch.cat([block.to(grad.dtype) * slopes[:, s : s + 1] for s, block in enumerate(blocks)], dim=1)
    return (FactoredGradient([RowFactor(rows, None)], weights) if ctx.as_factor else rows.to(weights.dtype)), None


differentiate("block_norms", _backward, _save)

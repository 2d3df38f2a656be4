"""Sparse-transposed times dense: what a weight gradient of a sparse autoencoder is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_dense, use_kernels
from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.dense import op as dense
from flashsae.ops.latent_rows import reference
from flashsae.ops.pattern import LatentIndex, Pattern, check_index
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import FLOATS, check_constant, check_device, check_float, check_shape, compute_dtype


def latent_rows(index: LatentIndex, coeffs: Tensor, rows: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum, for each latent, the rows of the tokens that use it.

        out[i] = Σ over entries e of latent i of coeffs[e] · rows[token of e]

    With coeffs = top_acts and rows = the gradient of x_hat this is the gradient of W_dec; with coeffs = the gradient
    of the pre-activations and rows = x it is that of W_enc_T. No [B, d_sae] tensor is made.

    Args:
        index: of the code that `coeffs` belongs to: its `pattern.index`.
        coeffs: [B, k] or [capacity], as the code, float. What stands in places that are not used is not read.
        rows: [B, d], float.
        dtype: of the result; None is that of rows.
    Returns:
        [d_sae, d]. A latent that no token uses has a row of zeros.
    Raises:
        ShapeError, DtypeError: coeffs or rows do not fit the index or each other.
        GradientError: they require a gradient.
    Numerics: deterministic; accumulated in float32 (float64 where coeffs or rows are), rounded once. A latent with
        more than 128 entries is summed in pieces of at most 128, the pieces in order.
    Gradients: none; it is used inside backward passes.
    Cost: B·k·d multiply-adds; reads B·k·d elements, writes d_sae·d. Long lists are spread over the device.
    Source: ours, docs/methodology.md#sparse-backward.
    """
    check_index(index)
    check_shape("coeffs", coeffs, ("capacity",) if index.k is None else ("B", index.k))
    check_shape("rows", rows, ("B" if index.k is None else coeffs.shape[0], "d"))
    check_float("coeffs", coeffs)
    check_float("rows", rows)
    for name, tensor in (("coeffs", coeffs), ("rows", rows)):
        check_device(name, tensor, index.entries, "the index")
        check_constant(name, tensor)
    if coeffs.numel() != index.entries.shape[0]:
        raise ShapeError(
            f"coeffs: expected {index.entries.shape[0]} entries, those of the index, got {coeffs.numel()}."
        )
    if dtype is not None and dtype not in FLOATS:
        raise DtypeError(f"dtype: expected one of float numbers, got {dtype}.")
    return sum_rows(index, coeffs, rows, dtype or rows.dtype)


def sum_rows(index: LatentIndex, coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Do `latent_rows` without checks."""
    out: Tensor = torch.ops.flashsae.latent_rows(index.lists, coeffs, rows, dtype)
    return out


def latent_sums(index: LatentIndex, coeffs: Tensor) -> Tensor:
    """Return the sum of the coefficients of each latent: [d_sae], compute dtype."""
    sums: Tensor = torch.ops.flashsae.latent_sums(index.lists, coeffs)
    return sums


def column_sums(coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ over tokens of coeffs · rows, [B] and [B, d] -> [d]: the case of one latent that every token uses."""
    total: Tensor = torch.ops.flashsae.column_sums(coeffs, rows, dtype)
    return total


def _latent_rows_fake(index: list[Tensor], coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(index[2].shape[0] - 1, rows.shape[1], dtype=dtype)


@operator(_latent_rows_fake)
def _latent_rows(index: list[Tensor], coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    lists = LatentIndex.of_lists(index, coeffs)
    if use_kernels(rows, coeffs):
        # lists of tokens may be those of joined codes, whose repeats a dense code would have to add up
        if lists.k is not None and use_dense(lists.k, lists.d_sae, rows):
            pattern = Pattern(lists.by_entry.view(coeffs.shape), lists.d_sae)
            return dense.latent_rows(pattern, coeffs, rows)[0].to(dtype)
        from flashsae.ops.latent_rows.launch import launch_latent_rows

        return launch_latent_rows(lists, coeffs, rows, dtype)
    return reference.latent_rows(lists, coeffs, rows).to(dtype)


def _latent_sums_fake(index: list[Tensor], coeffs: Tensor) -> Tensor:
    return coeffs.new_empty(index[2].shape[0] - 1, dtype=compute_dtype(coeffs.dtype))


@operator(_latent_sums_fake)
def _latent_sums(index: list[Tensor], coeffs: Tensor) -> Tensor:
    lists = LatentIndex.of_lists(index, coeffs)
    if use_kernels(coeffs):
        from flashsae.ops.latent_rows.launch import launch_latent_sums

        return launch_latent_sums(lists, coeffs)
    return reference.latent_sums(lists, coeffs)


def _save_latent_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lists, coeffs = inputs
    ctx.save_for_backward(*lists[:2])
    ctx.lists, ctx.shape, ctx.dtype = len(lists), coeffs.shape, coeffs.dtype


def _latent_sums_backward(ctx: Any, grad: Tensor) -> tuple[list[None], Tensor]:
    """Give each entry the gradient of its latent: 0 in places that are not used."""
    entries, latents = ctx.saved_tensors
    found = F.pad(grad.to(ctx.dtype), (0, 1))[latents]
    return [None] * ctx.lists, torch.empty_like(found).scatter_(0, entries, found).view(ctx.shape)


differentiate("latent_sums", _latent_sums_backward, _save_latent_sums)


def _column_sums_fake(coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(rows.shape[1], dtype=dtype)


@operator(_column_sums_fake)
def _column_sums(coeffs: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if use_kernels(rows, coeffs):
        from flashsae.ops.latent_rows.launch import launch_column_sums

        return launch_column_sums(coeffs, rows, dtype)
    return reference.column_sums(coeffs, rows).to(dtype)

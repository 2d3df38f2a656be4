"""Sparse-transposed times dense: what a weight gradient of a sparse autoencoder is."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops.index import LatentIndex
from flashsae.ops.latent_rows import reference
from flashsae.ops.validate import check_float, check_shape


@torch.no_grad()
def latent_rows(index: LatentIndex, coeffs: Tensor, rows: Tensor) -> Tensor:
    """Sum, for each latent, the rows of the tokens that use it.

        out[i] = Σ over entries e of latent i of coeffs[e] · rows[token of e]

    With coeffs = top_acts and rows = the gradient of x_hat this is the gradient of W_dec; with coeffs = the gradient
    of the pre-activations and rows = x it is that of W_enc_T. No [B, d_sae] tensor is made.

    Args:
        index: of the code that `coeffs` belongs to, from `build_index`.
        coeffs: [B, k], float.
        rows: [B, d], float.
    Returns:
        [d_sae, d], dtype of rows. A latent that no token uses has a row of zeros.
    Raises:
        ShapeError, DtypeError: coeffs or rows do not fit the index or each other.
    Numerics: deterministic; accumulated in float32 (float64 for float64) in runs of 256 entries, rounded once.
    Gradients: none; it is used inside backward passes.
    Cost: B·k·d multiply-adds; reads 2·B·k·d elements at most, writes d_sae·d.
    Source: ours, docs/methodology.md#sparse-backward.
    """
    check_shape("coeffs", coeffs, ("B", index.k))
    check_shape("rows", rows, (coeffs.shape[0], "d"))
    check_float("coeffs", coeffs)
    check_float("rows", rows)
    if coeffs.numel() != len(index.entries):
        raise ShapeError(f"coeffs: expected {len(index.entries)} entries, those of the index, got {coeffs.numel()}.")
    return reference.latent_rows(index, coeffs, rows).to(rows.dtype)

"""The same operations as dense matrix products, for codes so dense that gathering rows no longer pays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, InputBias, LatentActs, LatentBias, TopActs, TopIndices, Weights

_CODE_ELEMENTS = 1 << 26  # of the dense code in memory at once


def decode_sparse(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], compute dtype. Code and product are rounded to that of W_dec."""
    x_hat = product(top_acts, top_indices, W_dec)
    dtype = compute_dtype(W_dec.dtype)
    return x_hat.to(dtype) if b_dec is None else x_hat.to(dtype) + b_dec.to(dtype)


def product(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], dtype of W_dec."""
    x_hat = W_dec.new_empty(len(top_acts), W_dec.shape[1])
    for part in _parts(len(top_acts), len(W_dec)):
        torch.mm(code(top_acts[part], top_indices[part], W_dec), W_dec, out=x_hat[part])
    return x_hat


def decode_sparse_grad_acts(grad_x_hat: Activations, top_indices: TopIndices, W_dec: Weights) -> TopActs:
    """Multiply gradients by every row of W_dec and keep those of the code: -> [B, k], compute dtype."""
    grad_acts = torch.empty(top_indices.shape, dtype=compute_dtype(W_dec.dtype), device=W_dec.device)
    for part in _parts(len(top_indices), len(W_dec)):
        products = F.linear(grad_x_hat[part].to(W_dec.dtype), W_dec)
        grad_acts[part] = products.gather(1, top_indices[part].long())
    return grad_acts


def latent_rows(
    top_indices: TopIndices, coeffs: TopActs, rows: Activations, d_sae: int, with_sums: bool = False
) -> tuple[Weights, LatentBias | None]:
    """Multiply the transposed dense code by rows: -> [d_sae, d], dtype of rows; sum it: -> [d_sae], compute dtype.

    The code is rounded to the dtype of rows; sums over parts of the tokens are added in the compute dtype.
    """
    dtype = compute_dtype(rows.dtype)
    parts = _parts(len(rows), d_sae)
    like = rows.new_empty(d_sae, 0)
    if len(parts) == 1:
        whole = code(coeffs, top_indices, like)
        return whole.T @ rows, whole.sum(0, dtype=dtype) if with_sums else None
    total = torch.zeros(d_sae, rows.shape[1], dtype=dtype, device=rows.device)
    sums = torch.zeros(d_sae, dtype=dtype, device=rows.device)
    for part in parts:
        piece = code(coeffs[part], top_indices[part], like)
        total += piece.T @ rows[part]
        if with_sums:
            sums += piece.sum(0, dtype=dtype)
    return total.to(rows.dtype), sums if with_sums else None


def _parts(tokens: int, d_sae: int) -> list[slice]:
    step = max(1, _CODE_ELEMENTS // d_sae)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def code(top_acts: TopActs, top_indices: TopIndices, weights: Tensor) -> LatentActs:
    """Return the dense code in the dtype of [d_sae, ...] weights; repeats are summed."""
    if use_kernels(weights):
        from flashsae.ops.dense.launch import LARGEST_K, launch_dense_code

        if top_indices.shape[1] <= LARGEST_K:
            return launch_dense_code(top_acts, top_indices, len(weights), weights.dtype)
    zeros = weights.new_zeros(len(top_acts), len(weights))
    return zeros.scatter_add_(1, top_indices.long(), top_acts.to(weights.dtype))

"""The same operations as dense matrix products, for codes so dense that gathering rows no longer pays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashsae.ops.index import LatentIndex
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, InputBias, LatentActs, LatentBias, TopActs, TopIndices, Weights

_CODE_ELEMENTS = 1 << 26  # of the dense code in memory at once


def decode_sparse(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], compute dtype. Code and product are rounded to that of W_dec."""
    x_hat = W_dec.new_empty(len(top_acts), W_dec.shape[1])
    for part in _parts(len(top_acts), len(W_dec)):
        code = _code(top_acts[part], top_indices[part], len(W_dec)).to(W_dec.dtype)
        torch.mm(code, W_dec, out=x_hat[part])
    dtype = compute_dtype(W_dec.dtype)
    return x_hat.to(dtype) if b_dec is None else x_hat.to(dtype) + b_dec.to(dtype)


def decode_sparse_grad_acts(grad_x_hat: Activations, top_indices: TopIndices, W_dec: Weights) -> TopActs:
    """Multiply gradients by every row of W_dec and keep those of the code: -> [B, k], compute dtype."""
    grad_acts = torch.empty(top_indices.shape, dtype=compute_dtype(W_dec.dtype), device=W_dec.device)
    for part in _parts(len(top_indices), len(W_dec)):
        products = F.linear(grad_x_hat[part].to(W_dec.dtype), W_dec)
        grad_acts[part] = products.gather(1, top_indices[part].long()).to(grad_acts.dtype)
    return grad_acts


def latent_rows(index: LatentIndex, coeffs: TopActs, rows: Activations) -> tuple[Weights, LatentBias]:
    """Multiply the transposed dense code by rows, and sum it: -> [d_sae, d] and [d_sae], compute dtype."""
    top_indices = index.top_indices
    dtype = compute_dtype(rows.dtype)
    total = torch.zeros(index.d_sae, rows.shape[1], dtype=dtype, device=rows.device)
    sums = torch.zeros(index.d_sae, dtype=dtype, device=rows.device)
    for part in _parts(len(rows), index.d_sae):
        code = _code(coeffs[part].to(dtype), top_indices[part], index.d_sae)
        total += code.to(rows.dtype).T @ rows[part]
        sums += code.sum(0)
    return total, sums


def _parts(tokens: int, d_sae: int) -> list[slice]:
    step = max(1, _CODE_ELEMENTS // d_sae)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _code(top_acts: TopActs, top_indices: TopIndices, d_sae: int) -> LatentActs:
    code = top_acts.new_zeros(len(top_acts), d_sae)
    return code.scatter_add_(1, top_indices.long(), top_acts)

"""The same operations as dense matrix products, for codes so dense that gathering rows no longer pays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashsae.ops.index import LatentIndex
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, InputBias, TopActs, TopIndices, Weights

_CODE_ELEMENTS = 1 << 26  # of the dense code in memory at once


def decode_sparse(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], compute dtype. Code and product are rounded to that of W_dec."""
    x_hat = W_dec.new_empty(len(top_acts), W_dec.shape[1])
    for part in _parts(len(top_acts), len(W_dec)):
        torch.mm(_code(top_acts[part], top_indices[part], W_dec), W_dec, out=x_hat[part])
    dtype = compute_dtype(W_dec.dtype)
    return x_hat.to(dtype) if b_dec is None else x_hat.to(dtype) + b_dec.to(dtype)


def decode_sparse_grad_acts(grad_x_hat: Activations, top_indices: TopIndices, W_dec: Weights) -> TopActs:
    """Multiply gradients by every row of W_dec and keep those of the code: -> [B, k], compute dtype."""
    grad_acts = torch.empty(top_indices.shape, dtype=compute_dtype(W_dec.dtype), device=W_dec.device)
    for part in _parts(len(top_indices), len(W_dec)):
        products = F.linear(grad_x_hat[part].to(W_dec.dtype), W_dec)
        grad_acts[part] = products.gather(1, top_indices[part].long()).to(grad_acts.dtype)
    return grad_acts


def latent_rows(index: LatentIndex, coeffs: TopActs, rows: Activations) -> Weights:
    """Multiply the transposed dense code by rows: -> [d_sae, d], compute dtype."""
    top_indices = torch.empty_like(index.entries).scatter_(0, index.entries, index.latents.long()).view(coeffs.shape)
    total = torch.zeros(index.d_sae, rows.shape[1], dtype=compute_dtype(rows.dtype), device=rows.device)
    for part in _parts(len(rows), index.d_sae):
        total += _code(coeffs[part], top_indices[part], rows, index.d_sae).T @ rows[part]
    return total


def _parts(tokens: int, d_sae: int) -> list[slice]:
    step = max(1, _CODE_ELEMENTS // d_sae)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _code(
    top_acts: TopActs, top_indices: TopIndices, like: Weights | Activations, d_sae: int | None = None
) -> torch.Tensor:
    code = torch.zeros(len(top_acts), len(like) if d_sae is None else d_sae, device=like.device, dtype=top_acts.dtype)
    return code.scatter_add_(1, top_indices.long(), top_acts).to(like.dtype)

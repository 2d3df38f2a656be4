"""Sparse decode and the gradient of its activations, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, InputBias, TopActs, TopIndices, Weights

_GATHER_ELEMENTS = 1 << 19  # decoder rows gathered at once; about the size of a CPU core's cache


def decode_sparse(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Weighted sum of decoder rows: [B, k], [B, k], [d_sae, d_in], [d_in] -> [B, d_in], in the compute dtype."""
    dtype = compute_dtype(W_dec.dtype)
    if len(top_indices) == 0:
        return W_dec.new_zeros(0, W_dec.shape[1], dtype=dtype)
    acts = top_acts.to(dtype)
    x_hat = F.embedding_bag(top_indices, W_dec.to(dtype), mode="sum", per_sample_weights=acts)
    return x_hat if b_dec is None else x_hat + b_dec.to(dtype)


def decode_sparse_grad_acts(grad_x_hat: Activations, top_indices: TopIndices, W_dec: Weights) -> TopActs:
    """Dot product of each selected decoder row with its token's gradient: -> [B, k], in the compute dtype."""
    dtype = compute_dtype(W_dec.dtype)
    (B, k), d_in = top_indices.shape, W_dec.shape[1]
    grad_acts = torch.empty(B, k, dtype=dtype, device=W_dec.device)
    step = max(1, _GATHER_ELEMENTS // (k * d_in))
    for start in range(0, B, step):
        part = slice(start, start + step)
        rows = W_dec[top_indices[part].long()].to(dtype)
        torch.bmm(rows, grad_x_hat[part, :, None].to(dtype), out=grad_acts[part, :, None])
    return grad_acts

"""Sparse decode and the gradient of its activations, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.ops.validate import compute_dtype, packed
from flashsae.shapes import Activations, InputBias, TopActs, TopIndices, Weights


def decode_sparse(top_acts: TopActs, top_indices: TopIndices, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Weighted sum of decoder rows: [B, k], [B, k], [d_sae, d_in], [d_in] -> [B, d_in], in the compute dtype."""
    dtype = compute_dtype(top_acts.dtype, W_dec.dtype)
    if len(top_indices) == 0:
        return W_dec.new_zeros(0, W_dec.shape[1], dtype=dtype)
    acts, top_indices = packed(top_acts.to(dtype), top_indices)
    x_hat = F.embedding_bag(top_indices, W_dec.to(dtype), mode="sum", per_sample_weights=acts)
    return x_hat if b_dec is None else x_hat + b_dec.to(dtype)


def decode_sparse_grad_acts(
    grad_x_hat: Activations, top_indices: TopIndices, W_dec: Weights, dtype: torch.dtype
) -> TopActs:
    """Dot product of each selected decoder row with its token's gradient: -> [B, k], in `dtype`."""
    (B, k), device = top_indices.shape, W_dec.device
    starts = torch.arange(B, dtype=torch.int64, device=device) * k
    token = torch.arange(B, dtype=torch.int64, device=device).repeat_interleave(k)
    # what autograd does for the weights of an embedding bag: dot products where the rows lie, without a copy of them
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_x_hat.to(dtype), W_dec.to(dtype), packed(top_indices).flatten().long(), starts, token, 0
    )
    return dots.view(B, k)

"""The dense TopK SAE that everybody writes: naive autograd, [B, d_sae] everywhere. What ours must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_encode(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, top_indices: Tensor, b_dec: Tensor | None) -> Tensor:
    """Return latent_acts [B, d_sae] with the given selection, differentiable through plain autograd."""
    centered = x if b_dec is None else x - b_dec
    pre_acts = centered @ W_enc_T.T + b_enc
    mask = torch.zeros_like(pre_acts).scatter_(1, top_indices, 1.0)
    return torch.relu(pre_acts) * mask


def dense_topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return the selection by the documented rule, the slow and obvious way: largest value, then lowest index."""
    order = torch.sort(pre_acts, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values

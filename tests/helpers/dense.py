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


def dense_step_losses(x: Tensor, params: dict[str, Tensor], k: int, variance: float) -> tuple[Tensor, Tensor]:
    """Return x_hat and the loss of a dense TopK SAE, for training it beside ours; `variance` is that of a token."""
    pre_acts = (x - params["b_dec"]) @ params["W_enc_T"].T + params["b_enc"]
    latent_acts = dense_encode(x, params["W_enc_T"], params["b_enc"], pre_acts.topk(k, dim=1).indices, params["b_dec"])
    x_hat = latent_acts @ params["W_dec"] + params["b_dec"]
    return x_hat, (x - x_hat).square().sum() / (len(x) * variance)

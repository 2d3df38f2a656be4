"""The latent pass in plain PyTorch, and the two halves of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.shapes import LatentBias, Weights


@dataclass(frozen=True)
class AdamRule:
    """Hyperparameters of a step that do not change while training.

    Args:
        beta1, beta2: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: times the weights, added to the gradient as in `torch.optim.Adam`; see `decoupled`.
        unit_norm: keep rows at norm 1: project the gradient, and scale rows after the step.
        decoupled: shrink the weights by lr · weight_decay instead of adding to the gradient, as in AdamW.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    weight_decay: float = 0.0
    unit_norm: bool = False
    decoupled: bool = False


def split_halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into bfloat16 ones, rounded half up, and the 16 bits that this leaves out, as int16."""
    quiet = torch.full_like(weights, torch.nan)  # the bits of some NaNs would round to 0
    bits = torch.where(weights.isnan(), quiet, weights).view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def merge_halves(high: Tensor, low: Tensor) -> Tensor:
    """Undo `split_halves`, bit for bit."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def round_stochastically(values: Weights, step: Tensor, number: int, first_row: int = 0) -> Weights:
    """Round float32 to bfloat16 up or down, with the chance that makes the mean right; up in magnitude.

    The 16 random bits of a number are the half `number` (0 or 1) of a hash of step, row and column.
    """
    n, d = values.shape
    rows = torch.arange(first_row, first_row + n, dtype=torch.int64, device=values.device)[:, None]
    columns = torch.arange(d, dtype=torch.int64, device=values.device)
    bits = _mixed(_mixed(rows + step.long() * 0x9E3779B1) + columns)
    noise = (bits >> 16 if number else bits) & 0xFFFF
    finite = ((values.view(torch.int32) + noise.int()) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), finite, values).to(torch.bfloat16)


def _mixed(bits: Tensor) -> Tensor:
    """Return 32 bits in which each depends on all of the argument (the finaliser of MurmurHash3)."""
    mask = 0xFFFFFFFF
    bits = bits & mask
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return bits ^ (bits >> 16)


def projected(gradient: Weights, weights: Weights) -> Weights:
    """Remove from each row of a gradient the part along the row of weights, which only changes its norm."""
    return gradient - (gradient * weights).sum(1, keepdim=True) * weights


def row_squares(gradient: Weights, weights: Weights, unit_norm: bool) -> LatentBias:
    """Return the squared norm of each row of the gradient that the step uses: [d_sae]."""
    return (projected(gradient, weights) if unit_norm else gradient).square().sum(1)


def adam_rows(
    weights: Weights, exp_avg: Weights, exp_avg_sq: Weights, gradient: Weights, lr: Tensor, bias_correction: Tensor,
    rule: AdamRule,
) -> Weights:  # fmt: skip
    """Return the weights after a step of Adam, all [d_sae, d] of one dtype; both moments change in place."""
    if rule.unit_norm:
        gradient = projected(gradient, weights)
    if rule.weight_decay and not rule.decoupled:
        gradient = gradient + rule.weight_decay * weights
    exp_avg.lerp_(gradient, 1 - rule.beta1)
    exp_avg_sq.mul_(rule.beta2).addcmul_(gradient, gradient, value=1 - rule.beta2)
    first, second = bias_correction
    if rule.weight_decay and rule.decoupled:
        weights = weights * (1 - lr.double() * rule.weight_decay).to(weights.dtype)
    step_size = (lr.double() / first).to(weights.dtype)
    weights = weights - step_size * exp_avg / ((exp_avg_sq / second.to(weights.dtype)).sqrt() + rule.eps)
    if rule.unit_norm:
        weights = weights / torch.linalg.vector_norm(weights, dim=1, keepdim=True).clamp_min(1e-30)
    return weights

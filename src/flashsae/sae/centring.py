"""Encoders that do not subtract b_dec see x about its mean in training, and x as it comes behind it.

A step of Adam moves each weight by about the learning rate, and so a pre-activation by that times Σ_j abs(x_j): where
the mean of x is long beside its deviation, all tokens move alike, and latents are active on all of them or on none. So
a mean that is longer than the deviation is subtracted in training, and the biases of the trained SAE take it over:

    (x − x_mean) @ W_enc + b_enc = x @ W_enc + (b_enc − x_mean @ W_enc)

The same holds of W_skip and b_dec. A shorter one is left to b_enc from the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flashsae.ops.register import isolated

if TYPE_CHECKING:
    from flashsae.sae.module import SAE

_ROWS_AT_ONCE = 8192


@isolated
@torch.no_grad()
def center(sae: SAE, x: Tensor) -> None:
    """Let pre-activations of an SAE whose biases are 0 be those of x about its mean: [tokens, d_in]."""
    mean = _long_mean(sae, x)
    if mean is not None:
        sae.x_mean.copy_(mean)
        sae.centres = True
    else:
        sae.b_enc.copy_(-(sae.W_enc_T @ x.mean(0, dtype=sae.b_enc.dtype)))


@isolated
@torch.no_grad()
def recentered(sae: SAE, mean: Tensor | None) -> SAE:
    """Return the SAE that computes the same of x and whose encoder sees x less a mean; shares all but biases.

    Args:
        sae: with a parameter x_mean.
        mean: [d_in]; None for x as it comes.
    Numerics: products in float64, rounded once.
    """
    other = sae.normalizing(sae.config.normalize_activations)  # one of its own, whose biases may change
    for row in sae.architecture.parameters:
        if len(row.shape) < 2:
            own = getattr(sae, row.name).detach().clone()
            setattr(other, row.name, nn.Parameter(own) if row.trained else own)
    moved = (torch.zeros_like(sae.x_mean) if mean is None else mean).double() - sae.x_mean.double()
    (sae.architecture.recenter or shift_b_enc)(other, moved)
    other.x_mean.add_(moved)
    other.centres = mean is not None
    return other


@isolated
@torch.no_grad()
def center_again(sae: SAE, x: Tensor) -> None:
    """Do it to an SAE that has learnt already, which computes the same behind it; nothing where b_dec is subtracted."""
    mean = _long_mean(sae, x)
    if mean is not None:
        other = recentered(sae, mean)
        for row in sae.architecture.parameters:
            if len(row.shape) < 2:
                getattr(sae, row.name).copy_(getattr(other, row.name))
        sae.centres = True


def _long_mean(sae: SAE, x: Tensor) -> Tensor | None:
    """Return the mean of tokens, [d_in], float64, where it is longer than they deviate from it and is to be seen to."""
    if not hasattr(sae, "x_mean"):
        return None
    mean = x.mean(0, dtype=torch.float64)
    return mean if bool(mean.square().sum() > (x.double() - mean).square().sum(1).mean()) else None


def shift_b_enc(sae: SAE, moved: Tensor) -> None:
    """Let b_enc take over what pre-activations lose where the encoder sees x less a vector [d_in], float64."""
    sae.b_enc.add_(products(sae.W_enc_T, moved))


def products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return rows [n, d] @ a vector [d] in float64, some rows at once."""
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    return torch.cat([rows.detach()[start : start + _ROWS_AT_ONCE].double() @ vector for start in starts])

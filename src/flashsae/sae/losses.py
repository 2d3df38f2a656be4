"""Training losses are sums of squared errors of tokens; what they are relative to is a weight."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flashsae import distributed
from flashsae.errors import ConfigError
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations


def fvu_weights(x: Activations, variance: float) -> Float[Tensor, " B"]:
    """Return the weight of each token that makes a squared error a fraction of a given variance.

        weights = 1 / (B · variance)

    With them `flashsae.ops.decode_loss` gives Σ‖x − x_hat‖² / (B · variance): an estimate of the FVU whose
    denominator is fixed, so that no batch can make it vanish, be it of one token or of equal ones.

    Args:
        x: [B, d_in], a batch.
        variance: of a token, the mean of ‖x − mean x‖² over a sample of the data: `token_variance(sample)`.
    Returns:
        [B], float32 (float64 for float64), all equal, on the device of x.
    Raises:
        ConfigError: the variance is not a positive number.
    Gradients: none.
    Source: Gao et al. 2024 scale the loss by the variance of an initial sample in their code; the paper does not say.
    """
    if not 0.0 < variance < math.inf:
        raise ConfigError(f"variance: expected a positive number, got {variance}. Take that of a larger sample.")
    weight = 1 / (max(distributed.tokens_of(len(x)), 1) * variance)
    return torch.full((len(x),), weight, dtype=compute_dtype(x.dtype), device=x.device)


@torch.no_grad()
def token_variance(x: Activations) -> float:
    """Return the mean of ‖x − mean x‖² over tokens, in float64; 0 if it is no more than float64 rounds away.

    Args:
        x: [n, d_in], float.
    """
    if len(x) == 0:
        return 0.0
    wide = x.detach().double()
    mean = wide.mean(0)
    mean = mean + (wide - mean).mean(0)
    variance = (wide - mean).square().sum(1).mean().item()
    return variance if variance > mean.mul(1e-14).square().sum().item() else 0.0

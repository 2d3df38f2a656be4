"""Variance about the mean of a batch, in plain PyTorch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations


def total_variance(x: Activations) -> Float[Tensor, ""]:
    """Return Σ‖x − mean_B x‖² in the compute dtype."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide - wide.mean(0)).square().sum()

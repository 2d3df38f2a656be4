"""The variance of a batch: what reconstruction errors are relative to."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.register import operator
from flashsae.ops.validate import check_constant, check_float, check_shape, compute_dtype
from flashsae.ops.variance import reference


def total_variance(x: Tensor) -> Tensor:
    """Compute the total variance of a batch.

        Σ over b of ‖x[b] − mean over b of x[b]‖²

    Args:
        x: [B, d_in], float.
    Returns:
        scalar, float32 (float64 for float64). 0 for B < 2.
    Raises:
        ShapeError, DtypeError: x is not a float [B, d_in].
        GradientError: x requires a gradient.
    Numerics: deterministic; two passes over pieces of the batch, so that a large mean costs no digits.
    Gradients: none.
    Cost: reads x once.
    Source: pieces are combined as in Chan, Golub and LeVeque 1983.
    """
    check_shape("x", x, ("B", "d_in"))
    check_float("x", x)
    check_constant("x", x)
    total: Tensor = torch.ops.flashsae.total_variance(x)
    return total


def _total_variance_fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=compute_dtype(x.dtype))


@operator(_total_variance_fake)
def _total_variance(x: Tensor) -> Tensor:
    if len(x) == 0:
        return x.new_zeros((), dtype=compute_dtype(x.dtype))
    if use_kernels(x):
        from flashsae.ops.variance.launch import launch_total_variance

        return launch_total_variance(x)
    return reference.total_variance(x)

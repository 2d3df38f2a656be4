"""The variance of a batch: what reconstruction errors are relative to."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.validate import check_float, check_shape
from flashsae.ops.variance import reference


@torch.no_grad()
def total_variance(x: Tensor) -> Tensor:
    """Compute the total variance of a batch.

        Σ over b of ‖x[b] − mean over b of x[b]‖²

    Args:
        x: [B, d_in], float.
    Returns:
        scalar, float32 (float64 for float64). 0 for B < 2.
    Raises:
        ShapeError, DtypeError: x is not a float [B, d_in].
    Numerics: deterministic; two passes over pieces of the batch, so that a large mean costs no digits.
    Gradients: none.
    Cost: reads x once.
    Source: pieces are combined as in Chan, Golub and LeVeque 1983.
    """
    check_shape("x", x, ("B", "d_in"))
    check_float("x", x)
    if use_kernels(x):
        from flashsae.ops.variance.launch import launch_total_variance

        return launch_total_variance(x)
    return reference.total_variance(x) if len(x) else x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))

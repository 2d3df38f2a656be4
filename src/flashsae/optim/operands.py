"""What the pass over rows is given: matrices, gradients, settings of a group; and the halves of split weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import DtypeError
from flashsae.ops.adam_rows import AdamRule
from flashsae.ops.adam_rows.reference import merge_halves, split_halves
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.factors import RowGradient

_ROWS = 8192  # of a matrix that is split or merged, at once


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when somebody else writes to a parameter, or puts other memory in its place."""
    return parameter._version, parameter.data_ptr()


def merged_rows(high: Tensor, low: Tensor) -> Iterator[Tensor]:
    """Yield the float32 rows of a split matrix, some at a time."""
    for high_rows, low_rows in zip(torch.split(high, _ROWS), torch.split(low, _ROWS)):
        yield merge_halves(high_rows, low_rows)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix a few rows at a time: beside it and its halves there may be no room."""
    high, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    for rows, *halves in zip(*(torch.split(t, _ROWS) for t in (whole, high, low))):
        for half, value in zip(halves, split_halves(rows)):
            half.copy_(value)
    return high, low


def matrix_of(tensor: Tensor) -> Tensor:
    """Return a bias as a matrix of one row, so that there is one implementation of Adam."""
    return tensor.detach() if tensor.dim() == 2 else tensor.detach().view(1, -1)


def gradient_of(parameter: Tensor) -> RowGradient:
    """Return the gradient of a parameter as the pass over rows takes it.

    Raises:
        DtypeError: it is a sparse tensor.
    """
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise DtypeError("a gradient is a sparse tensor, which Adam does not take: use .grad.to_dense().")
    if isinstance(grad, FactoredGradient):
        return grad.row_gradient()
    return RowGradient(dense=grad if parameter.dim() == 2 else grad.reshape(1, -1))


def rule_of(parameter: Tensor, group: dict[str, Any]) -> AdamRule:
    """Return the settings of a group as they are for a parameter."""
    beta1, beta2 = map(float, group["betas"])
    unit_norm = group["unit_norm"] and parameter.dim() == 2
    weight_decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
    return AdamRule(beta1, beta2, float(group["eps"]), weight_decay, unit_norm, decoupled)

"""Scales that are multiplied into parameters: in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_A_TIME = 1 << 24
"""Elements of a matrix that are widened at once."""
_ROUNDED = 1e-5
"""Norms that were set to one value differ by less, relative to it, in float32."""


def site_norms(W_dec: Tensor, sites: int = 1) -> Tensor:
    """Return the norms of rows at each of several sites beside each other, [d_sae, sites], float64."""
    blocks = W_dec.reshape(len(W_dec), sites, -1)
    parts = [torch.linalg.vector_norm(blocks[rows].double(), dim=2) for rows in _slices(W_dec)]
    return torch.cat(parts)


def common_norms(W_dec: Tensor, sites: int) -> Tensor | None:
    """Return the norm of each row, [d_sae], where it is the same at every site; None where it is not."""
    found = site_norms(W_dec, sites)
    low, high = found.amin(1), found.amax(1)
    return found.mean(1) if bool((high - low <= _ROUNDED * high).all()) else None


def scaled(tensor: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Return a tensor times a number for each row and for each column, float64; as it is where there are none.

    Args:
        tensor: [n, m] or [n].
        rows: [n], or one for all.
        columns: [m].
    """
    if rows is None and columns is None:
        return tensor
    made = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for part in _slices(tensor):
        values = tensor[part].double()
        if rows is not None:
            of_part = rows[part] if rows.dim() else rows
            values = values * (of_part.unsqueeze(1) if rows.dim() and values.dim() == 2 else of_part)
        made[part] = (values if columns is None else values * columns).to(tensor.dtype)
    return made


def _slices(tensor: Tensor) -> list[slice]:
    step = max(1, _AT_A_TIME // max(1, tensor[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(tensor), step)]

"""Sparse codes for tests: of plain tensors, and of varying length."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.ops import LatentIndex, Pattern, SparseCode


def index_of(top_indices: Tensor, d_sae: int) -> LatentIndex:
    """Return the index of k latents for each token."""
    return Pattern.topk(top_indices, d_sae).index


def topk_of(top_acts: Tensor, top_indices: Tensor, weights: Tensor) -> SparseCode:
    """Return the code of k of the latents of a [d_sae, ...] matrix for each token."""
    return SparseCode.topk(top_acts, top_indices, len(weights))


def ragged(counts: list[int], d_sae: int, generator: torch.Generator, *, spare: int = 0) -> Pattern:
    """Return a pattern of so many latents for each token, and places that are not used behind them."""
    rows = [torch.randperm(d_sae, generator=generator)[:count].sort().values for count in counts]
    unused = torch.full((spare,), d_sae, dtype=torch.int64)
    starts = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
    return Pattern.rows(torch.cat([*rows, unused]), starts, d_sae)


def to(pattern: Pattern, device: torch.device | str) -> Pattern:
    """Return a pattern on a device."""
    if pattern.is_full:
        return Pattern.full(pattern.B, pattern.d_sae, device=device, count=pattern.count)
    if pattern.is_full:
        return Pattern.full(pattern.B, pattern.d_sae, device=device, count=pattern.count)
    starts, count = (None if t is None else t.to(device) for t in (pattern.starts, pattern.count))
    return Pattern(pattern.latents.to(device), pattern.d_sae, starts, count)


def dense_of(pattern: Pattern, acts: Tensor) -> Tensor:
    """Return the dense code, [B, d_sae], the slow and obvious way; differentiable."""
    if pattern.starts is None:
        return acts.new_zeros(pattern.B, pattern.d_sae).scatter_add(1, pattern.latents.long(), acts)
    rows = []
    for start, stop in zip(pattern.starts.tolist(), pattern.starts.tolist()[1:]):
        latents = pattern.latents[start:stop].long()
        rows.append(acts.new_zeros(pattern.d_sae).index_add(0, latents, acts[start:stop]))
    return torch.stack(rows) if rows else acts[:0, None].expand(0, pattern.d_sae)

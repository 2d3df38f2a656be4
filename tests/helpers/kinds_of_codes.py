"""The same code in each of the forms that there are."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.ops import Pattern, SparseCode

KINDS = ["fixed", "varying", "full"]


def code_of(kind: str, dense: Tensor) -> SparseCode:
    """Return the code whose dense form this is, [sequences, positions, d_sae] with 3 entries a token at most."""
    *shape, d_sae = dense.shape
    flat = dense.flatten(0, -2)
    if kind == "fixed":
        acts, latents = flat.topk(3)
        return SparseCode(Pattern.topk(latents, d_sae), acts, tuple(shape))
    if kind == "full":
        return SparseCode(Pattern.full(len(flat), d_sae), flat, tuple(shape))
    tokens, latents = flat.nonzero(as_tuple=True)
    starts = torch.searchsorted(tokens, torch.arange(len(flat) + 1))
    room = torch.tensor([d_sae, d_sae])  # places that are not used
    pattern = Pattern.rows(torch.cat([latents, room]), starts, d_sae)
    return SparseCode(pattern, torch.cat([flat[tokens, latents], torch.zeros(2)]), tuple(shape))

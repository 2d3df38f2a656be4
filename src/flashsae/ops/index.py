"""The index of a step: for every latent the entries of the sparse code that use it (CSC). Integer, deterministic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.ops.validate import check_indices, check_shape


@dataclass(frozen=True)
class LatentIndex:
    """Lists of code entries by latent.

    Args:
        entries: [nnz], int64. Positions in the flattened [B, k] code, by latent, then by token.
        offsets: [d_sae + 1], int64. Latent i owns entries[offsets[i]:offsets[i + 1]].
        k: entries of each token, so entry e belongs to token e // k.
    """

    entries: Tensor
    offsets: Tensor
    k: int

    @property
    def tokens(self) -> Tensor:
        """Token of each entry: [nnz], int64, ascending within a latent."""
        return self.entries // self.k

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.offsets) - 1


def build_index(top_indices: Tensor, d_sae: int) -> LatentIndex:
    """List for every latent the code entries that use it.

    Args:
        top_indices: [B, k], int32 | int64, each in [0, d_sae). Repeats within a row are kept, in order.
        d_sae: number of latents.
    Returns:
        the index; a stable sort, so two runs give the same lists.
    Raises:
        ShapeError, DtypeError: top_indices is not [B, k], not integer, or out of range.
    Cost: one stable sort of B * k keys.
    Source: compressed sparse columns; ours: the lists serve every latent-major pass of a step.
    """
    check_shape("top_indices", top_indices, ("B", "k"))
    check_indices("top_indices", top_indices, d_sae)
    latents = top_indices.flatten()
    entries = torch.argsort(latents, stable=True)
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=latents.device)
    torch.cumsum(torch.bincount(latents, minlength=d_sae), 0, out=offsets[1:])
    return LatentIndex(entries, offsets, top_indices.shape[1])

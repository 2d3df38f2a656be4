"""The index of a step: for every latent the entries of the sparse code that use it (CSC). Integer, deterministic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.validate import as_int, check_indices, check_shape, has_values


class LatentIndex(NamedTuple):
    """Lists of code entries by latent.

    Args:
        entries: [nnz], int64. Positions in the flattened [B, k] code, by latent, then by token.
        latents: [nnz], int32. Latent of each of them, ascending.
        offsets: [d_sae + 1], int32. Latent i owns entries[offsets[i]:offsets[i + 1]].
        k: entries of each token, so entry e belongs to token e // k.
        source: [B, k]: the indices that it was built of, which `is_of` compares with others.
        version: how often the memory of these had been written to.
    """

    entries: Tensor
    latents: Tensor
    offsets: Tensor
    k: int
    source: Tensor | None = None
    version: int = 0

    def of(self, top_indices: Tensor) -> LatentIndex:
        """Return this index as that of `top_indices`, as they are now."""
        return LatentIndex(self.entries, self.latents, self.offsets, self.k, top_indices, _version(top_indices))

    def is_of(self, top_indices: Tensor) -> bool:
        """Tell whether it was built of these indices, and they were not changed since; no wait for the device.

        Views of the same memory, such as other leading dimensions, are the same indices. Copies are not.
        """
        source = self.source
        if source is None:
            return False
        if not (has_values(source) and has_values(top_indices)):
            return source is top_indices
        is_same = source is top_indices or (
            source.data_ptr() == top_indices.data_ptr()
            and (source.numel(), source.dtype, source.device)
            == (top_indices.numel(), top_indices.dtype, top_indices.device)
            and top_indices.shape[-1:] == source.shape[-1:]
            and (source.stride() == top_indices.stride() or (source.is_contiguous() and top_indices.is_contiguous()))
        )
        if not is_same or _version(source) != self.version:
            return False
        # writes through .data or NumPy are not counted: on the CPU the numbers tell, a GPU would make the host wait
        return source.device.type != "cpu" or torch.equal(self.top_indices.flatten(), source.flatten().long())

    @property
    def tokens(self) -> Tensor:
        """Token of each entry: [nnz], int64, ascending within a latent."""
        return self.entries // self.k

    @property
    def top_indices(self) -> Tensor:
        """Return the indices that the index was built of: [B, k], int64."""
        flat = torch.empty_like(self.entries).scatter_(0, self.entries, self.latents.long())
        return flat.view(-1, self.k)

    @property
    def counts(self) -> Tensor:
        """Entries of each latent: [d_sae], int32."""
        return self.offsets.diff()

    def part(self, start: int, stop: int) -> LatentIndex:
        """Return the lists of the latents from start to stop alone: of an incomplete code. Waits for a GPU."""
        first, last = (int(self.offsets[latent]) for latent in (start, stop))
        latents, offsets = self.latents[first:last] - start, self.offsets[start : stop + 1] - first
        return LatentIndex(self.entries[first:last], latents, offsets, self.k)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.offsets.shape[0] - 1


def check_index(index: LatentIndex) -> None:
    """Raise DtypeError unless this is an index."""
    if not isinstance(index, LatentIndex):
        raise DtypeError(f"index: expected a LatentIndex, from build_index, got {type(index).__name__}.")


def _version(tensor: Tensor) -> int:
    """Return how often the memory of a tensor was written to; 0 where PyTorch does not count."""
    return tensor._version if has_values(tensor) and not tensor.is_inference() else 0


def build_index(top_indices: Tensor, d_sae: int) -> LatentIndex:
    """List for every latent the code entries that use it.

    Args:
        top_indices: [B, k], int32 | int64, each in [0, d_sae); B * k < 2**31. Repeats within a row are kept, in order.
        d_sae: number of latents.
    Returns:
        the index; a stable sort, so two runs give the same lists.
    Raises:
        ShapeError, DtypeError: top_indices is not [B, k], not integer, or out of range.
    Cost: one stable sort of B * k keys of 32 bits, or 16, and a binary search for each latent. No wait for the device.
    Source: compressed sparse columns; ours: the lists serve every latent-major pass of a step.
    """
    check_shape("top_indices", top_indices, ("B", "k"))
    d_sae = as_int("d_sae", d_sae)
    if d_sae < 1:
        raise ConfigError(f"d_sae: expected a positive int, got {d_sae}.")
    check_indices("top_indices", top_indices, d_sae)
    if top_indices.numel() >= 2**31:
        raise ShapeError(
            f"top_indices: expected fewer than 2**31 entries, got {top_indices.numel()}: use fewer tokens."
        )
    narrow = torch.int16 if d_sae < 2**15 else torch.int32  # half the bits, half the passes of a radix sort
    keys, entries = torch.sort(top_indices.flatten().to(narrow), stable=True)
    latents = keys.to(torch.int32)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
    offsets = torch.searchsorted(latents, bounds, out_int32=True)
    return LatentIndex(entries, latents, offsets, top_indices.shape[1]).of(top_indices)

"""The entries of a code by latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashsae.errors import DtypeError


class LatentIndex(NamedTuple):
    """Lists of code entries by latent (CSC). An entry is a place in the flattened latents of a pattern.

    Args:
        entries: [capacity], int64, by latent, then by token. Places that are not used stand at the end.
        latents: [capacity], int32. Latent of each of them, ascending; d_sae where a place is not used.
        offsets: [d_sae + 1], int32. Latent i owns entries[offsets[i]:offsets[i + 1]].
        k: entries of each token, so entry e belongs to token e // k; None where tokens differ.
        tokens: [capacity], int32. Token of each of `entries`; None where k tells.
    """

    entries: Tensor
    latents: Tensor
    offsets: Tensor
    k: int | None
    tokens: Tensor | None = None

    @property
    def entry_tokens(self) -> Tensor:
        """Token of each of `entries`, whatever the kind of code: [capacity], ascending within a latent."""
        if self.tokens is not None:
            return self.tokens
        assert self.k is not None
        return self.entries // self.k

    @property
    def by_entry(self) -> Tensor:
        """Latent of each place of the code: [capacity], int64, d_sae where it is not used."""
        return torch.empty_like(self.entries).scatter_(0, self.entries, self.latents.long())

    @property
    def counts(self) -> Tensor:
        """Entries of each latent: [d_sae], int32."""
        return self.offsets.diff()

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.offsets.shape[0] - 1

    @property
    def lists(self) -> list[Tensor]:
        """The tensors, as operators take them; `of_lists` puts them together again."""
        return [*self[:3], *([] if self.tokens is None else [self.tokens])]

    @classmethod
    def of_lists(cls, lists: Sequence[Tensor], coeffs: Tensor) -> LatentIndex:
        """Return the index whose `lists` these are; coefficients of a code have its shape."""
        entries, latents, offsets, *tokens = lists
        return cls(entries, latents, offsets, None if tokens else coeffs.shape[1], *tokens)

    @classmethod
    def of_entries(
        cls, latents: Tensor, d_sae: int, *, k: int | None = None, tokens: Tensor | None = None
    ) -> LatentIndex:
        """Sort entries by latent; equal latents keep their order.

        Args:
            latents: [capacity], int32 | int64, in [0, d_sae]; d_sae stands for no latent.
            d_sae: number of latents.
            k, tokens: either k, or the token of each entry, [capacity].
        """
        narrow = torch.int16 if d_sae < 2**15 else torch.int32  # half the bits, half the passes of a radix sort
        keys, entries = torch.sort(latents.to(narrow), stable=True)
        ordered = keys.to(torch.int32)
        bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=ordered.device)
        offsets = torch.searchsorted(ordered, bounds, out_int32=True)
        return cls(entries, ordered, offsets, k, None if tokens is None else tokens.to(torch.int32)[entries])

    def part(self, start: int, stop: int) -> LatentIndex:
        """Return the lists of the latents from start to stop alone: of an incomplete code. Waits for a GPU."""
        first, last = (int(self.offsets[latent]) for latent in (start, stop))
        latents, offsets = self.latents[first:last] - start, self.offsets[start : stop + 1] - first
        tokens = None if self.tokens is None else self.tokens[first:last]
        return LatentIndex(self.entries[first:last], latents, offsets, self.k, tokens)


def check_index(index: LatentIndex) -> None:
    """Raise DtypeError unless this is an index."""
    if not isinstance(index, LatentIndex):
        raise DtypeError(f"index: expected a LatentIndex, from Pattern.index, got {type(index).__name__}.")

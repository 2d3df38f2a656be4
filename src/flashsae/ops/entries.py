"""Codes with other entries: values found by latent, entries added, and codes of positions that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops.code import SparseCode
from flashsae.ops.pattern import Pattern


def slots(pattern: Pattern, latents: Tensor) -> Tensor:
    """Return which of some latents stands at each place of a code: its number among them, or L where none does.

    Args:
        pattern: of the code.
        latents: [L], int64, each once, on the device of the code.
    Returns:
        of the shape of the code's latents, int64.
    Cost: O(entries + d_sae), whatever L; no wait for the device.
    """
    L = len(latents)
    slot = torch.full((pattern.d_sae + 1,), L, dtype=torch.int64, device=latents.device)  # places not used hold d_sae
    slot[latents] = torch.arange(L, dtype=torch.int64, device=latents.device)
    return slot[:-1].expand(pattern.B, -1) if pattern.is_full else slot[pattern.latents.long()]


def firsts(pattern: Pattern, slot: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Return which of L latents a token has an entry of, and which entries are the first of their token and latent.

    Args:
        pattern: of the code.
        slot: as `slots` returns it.
        L: number of the latents.
    Returns:
        present: [B, L], bool.
        is_first: of the shape of slot, bool; only where the number of latents is fixed can one be there twice.
    Cost: O(entries + B·L); no wait for the device.
    """
    B, width = pattern.B, slot.shape[-1] if pattern.starts is None else 1
    if pattern.starts is None and not pattern.is_full:
        place = torch.arange(width, dtype=torch.int64, device=slot.device).expand_as(slot)
        first = torch.full((B, L + 1), width, dtype=torch.int64, device=slot.device)
        first.scatter_reduce_(1, slot, place, "amin")
        return first[:, :L] < width, first.gather(1, slot) == place
    there = torch.zeros((B + 1) * (L + 1), dtype=torch.bool, device=slot.device)
    there[pattern.tokens.long() * (L + 1) + slot.flatten()] = True
    return there.view(-1, L + 1)[:-1, :-1], torch.ones_like(slot, dtype=torch.bool)


@dataclass(frozen=True)
class Wider:
    """A pattern with more entries than another has.

    Args:
        pattern: with the entries of both.
        order: of the entries of the first and then those that were added, [capacity], int64; None where they simply
            stand behind each other in each token.
    """

    pattern: Pattern
    order: Tensor | None

    def acts(self, old: Tensor, added: Tensor) -> Tensor:
        """Return values for this pattern.

        Args:
            old: for each entry of the narrower pattern.
            added: [B, L], for each latent that was added; those not wanted are left out, or must be 0.
        """
        if self.order is None:
            return torch.cat([old, added.to(old.dtype)], dim=1)
        return torch.cat([old, added.to(old.dtype).flatten()]).index_select(0, self.order)


def widened(pattern: Pattern, latents: Tensor, wanted: Tensor) -> Wider:
    """Return a pattern to which entries are added.

    Args:
        pattern: not a full one, which has them all.
        latents: [L], int64, on its device.
        wanted: [B, L], bool: which entries are added to which tokens, none of which is there. Where every token has the
            same number of latents the others are added too, and must have the value 0.
    Cost: fixed k: none. Varying: a sort of the entries, and one wait for the device.
    """
    if pattern.starts is None:
        more = latents.to(pattern.latents.dtype).expand(pattern.B, -1)
        return Wider(Pattern(torch.cat([pattern.latents, more], dim=1), pattern.d_sae), None)
    B, width, capacity = pattern.B, pattern.d_sae + 1, pattern.capacity
    added = wanted.flatten().nonzero()[:, 0]
    keys = torch.arange(B, dtype=torch.int64, device=latents.device)[:, None] * width + latents
    both = torch.cat([pattern.tokens.long() * width + pattern.latents, keys.flatten()[added]])
    both, order = both.sort(stable=True)
    starts = pattern.starts + torch.nn.functional.pad(wanted.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    source = torch.cat([torch.arange(capacity, dtype=torch.int64, device=latents.device), added + capacity])
    return Wider(Pattern((both % width).to(torch.int32), pattern.d_sae, starts), source[order])


def joined(codes: Sequence[SparseCode]) -> SparseCode:
    """Return the code of positions that follow each other, [sequences, positions], from those of parts of them.

    Args:
        codes: each of the shape [sequences, some positions], with as many sequences; of one SAE.
    Raises:
        ShapeError: they have other shapes.
    Gradients: of the values of each.
    Cost: a copy; where tokens have different numbers of latents a sort, and a wait for the device.
    """
    if len(codes) == 1:
        return codes[0]
    shapes = [code.shape for code in codes]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ShapeError(
            f"codes: expected the shapes [sequences, positions] with one number of sequences, got "
            f"{', '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}: read them one by one."
        )
    sequences, d_sae = shapes[0][0], codes[0].d_sae
    shape = (sequences, sum(positions for _, positions in shapes))
    patterns = [code.pattern for code in codes]
    if all(pattern.k is not None and pattern.k == patterns[0].k for pattern in patterns):
        acts = torch.cat([code.top_acts for code in codes], dim=1).flatten(0, 1)
        if all(pattern.is_full for pattern in patterns):
            return SparseCode(Pattern.full(len(acts), d_sae, device=acts.device), acts, shape)
        latents = torch.cat([code.top_indices for code in codes], dim=1).flatten(0, 1)
        return SparseCode(Pattern(latents, d_sae), acts, shape)
    rows = [_entries(code) for code in codes]
    firsts = accumulate((positions for _, positions in shapes[:-1]), initial=0)
    token = torch.cat(
        [
            tokens // positions * shape[1] + first + tokens % positions
            for (tokens, *_), (_, positions), first in zip(rows, shapes, firsts)
        ]
    )
    keys, order = (token * d_sae + torch.cat([latents for _, latents, _ in rows])).sort(stable=True)
    bounds = torch.arange(sequences * shape[1] + 1, dtype=torch.int64, device=keys.device) * d_sae
    starts = torch.searchsorted(keys, bounds, out_int32=True)
    acts = torch.cat([acts for *_, acts in rows])[order]
    return SparseCode(Pattern((keys % d_sae).to(torch.int32), d_sae, starts), acts, shape)


def _entries(code: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, latent and value of each entry that is not 0."""
    pattern = code.pattern
    acts, latents = code.acts.flatten(), pattern.latents.flatten().long()
    kept = ((acts != 0) & (latents < pattern.d_sae)).nonzero()[:, 0]
    return pattern.tokens.long()[kept], latents[kept], acts[kept]


def check_same_tokens(name: str, code: SparseCode, other: SparseCode) -> None:
    """Raise ShapeError or ConfigError unless a code is of the tokens and the SAE of another one."""
    if code.shape != other.shape:
        raise ShapeError(f"{name}: expected a code of the shape {list(other.shape)}, got {list(code.shape)}.")
    if code.d_sae != other.d_sae:
        raise ConfigError(f"{name}: expected a code of {other.d_sae} latents, got one of {code.d_sae}.")

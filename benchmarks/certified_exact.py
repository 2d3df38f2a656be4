"""Selections in float64, and by how much float32 may differ from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.certified_cases import Selected
from flashsae.ops.encode.keys import Keys
from flashsae.precision import operand_of

AT_ONCE = 1 << 28
"""Pre-activations in float64 at once."""


class Exact:
    """What is selected from, in float64: of operands as a precision rounds them."""

    def __init__(self, of: Selected, precision: str) -> None:
        dtype = torch.bfloat16 if operand_of(precision) == "bf16" else torch.float32
        self.x, self.W, self.b_enc = of.x.to(dtype), of.W.to(dtype).double(), of.keys.b_enc.double()
        self.keys = Keys(self.b_enc, of.keys.scale, of.keys.magnitude)
        self.scale = torch.ones_like(self.b_enc) if of.keys.scale is None else of.keys.scale.double()
        self.norms = self.W.norm(dim=1)

    def parts(self) -> Iterator[slice]:
        """Yield tokens that are looked at together."""
        step = max(1, AT_ONCE // len(self.W))
        for first in range(0, len(self.x), step):
            yield slice(first, min(first + step, len(self.x)))

    def of(self, rows: slice) -> Block:
        """Return what is selected from of some tokens."""
        x = self.x[rows].double()
        pre_acts = x @ self.W.T + self.b_enc
        return Block(self, x.norm(dim=1), pre_acts, self.keys.of(pre_acts))


@dataclass(frozen=True)
class Block:
    """Pre-activations of some tokens in float64.

    Args:
        exact: where they come from.
        norms: [tokens].
        pre_acts: [tokens, d_sae].
        keys: [tokens, d_sae].
    """

    exact: Exact
    norms: Tensor
    pre_acts: Tensor
    keys: Tensor

    def at(self, rows: Tensor) -> Block:
        """Return the block of some of the tokens."""
        return Block(self.exact, self.norms[rows], self.pre_acts[rows], self.keys[rows])

    def _rounding(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Return by how much float32 may differ from the pre-activations at some places."""
        d = self.exact.x.shape[1]
        products: Tensor = (d / 128 + 32) * 2.0**-23 * self.norms[tokens] * self.exact.norms[latents]
        products += 2.0**-23 * (self.pre_acts[tokens, latents].abs() + self.exact.b_enc[latents].abs())
        return products + d * 2.0**-149

    def _rounding_of_keys(self, tokens: Tensor, latents: Tensor) -> Tensor:
        return self._rounding(tokens, latents) * self.exact.scale[latents] + 2.0**-149

    def _tokens(self, latents: Tensor) -> Tensor:
        return torch.arange(len(latents), device=latents.device)[:, None].expand_as(latents)

    @staticmethod
    def places(starts: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token of each entry of a code, and its latent."""
        counts = starts.long().diff()
        tokens = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return tokens, latents[: len(tokens)].long()

    def wrong_values(self, values: Tensor, latents: Tensor, tokens: Tensor | None = None) -> int:
        """Count values that differ by more than float32 can round."""
        tokens = self._tokens(latents) if tokens is None else tokens
        off = (values[: len(tokens)].double() - self.pre_acts[tokens, latents]).abs()
        return int((~(off <= self._rounding(tokens, latents))).sum())

    def misses(self, latents: Tensor) -> tuple[int, int]:
        """Count picks of each token below its k-th largest key: those inside the rounding of both, and the others."""
        best, tokens = self.keys.topk(latents.shape[1], dim=1), self._tokens(latents)
        below = best.values[:, -1:] - self.keys.gather(1, latents)
        displaced = ~(best.indices[:, :, None] == latents[:, None, :]).any(2)
        rounding = torch.where(displaced, self._rounding_of_keys(tokens, best.indices), 0).amax(1, keepdim=True)
        return _sorted_out(below, self._rounding_of_keys(tokens, latents) + rounding)

    def misses_of_batch(self, tokens: Tensor, latents: Tensor) -> tuple[int, int]:
        """Do the same for the largest of all."""
        chosen, n = self.keys[tokens, latents], self.keys.shape[1]
        if int((self.keys > chosen.min()).sum()) < len(chosen):
            return 0, 0
        best = self.keys.flatten().topk(len(chosen))
        displaced = torch.ones_like(self.keys, dtype=torch.bool)
        displaced[tokens, latents] = False
        at = best.indices[displaced.flatten()[best.indices]]
        rounding = self._rounding_of_keys(at // n, at % n).max() + self._rounding_of_keys(tokens, latents)
        return _sorted_out(best.values[-1] - chosen, rounding)

    def misses_of_threshold(self, tokens: Tensor, latents: Tensor, threshold: Tensor) -> tuple[int, int]:
        """Count places on the wrong side of a threshold: those inside their rounding, and the others."""
        differs = self.pre_acts > threshold
        differs[tokens, latents] ^= True
        tokens, latents = differs.nonzero(as_tuple=True)
        off = (self.pre_acts[tokens, latents] - threshold).abs()
        # what equals a threshold does not exceed it
        return _sorted_out(off.clamp(min=2.0**-1074), self._rounding(tokens, latents))


def _sorted_out(below: Tensor, rounding: Tensor) -> tuple[int, int]:
    return int(((below > 0) & (below <= rounding)).sum()), int((~(below <= rounding)).sum())


def broken_ties(picked: Tensor, n: int, copies: int) -> int:
    """Count picks that are a copy of a latent of which a lower one was left out: of j, j + n / copies and so on."""
    apart = n // copies
    base, order = (picked % apart).sort(dim=1, stable=True)
    place = torch.arange(picked.shape[1], device=picked.device).expand_as(base)
    begins = torch.where(torch.nn.functional.pad(base.diff(dim=1) != 0, (1, 0), value=True), place, 0)
    return int(((picked // apart).gather(1, order) != place - begins.cummax(dim=1).values).sum())

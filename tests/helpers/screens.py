"""What an 8-bit screen says of keys, made from the exact ones, and the selection that has to come of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.product import Part
from flashsae.ops.encode.screen import Screened

GROUP = 32


def exact_pre_acts(x: Tensor, W: Tensor, keys: Keys) -> Tensor:
    """Return [B, n] in float64."""
    return x.double() @ W.double().T + keys.b_enc.double()


def groups_of(values: Tensor, n: int) -> Tensor:
    """Return the largest of each 32 of the first n."""
    return F.pad(values[:, :n], (0, -n % GROUP), value=-torch.inf).unflatten(1, (-1, GROUP)).amax(2)


def as_keys(values: Tensor) -> Tensor:
    """Return integers that order as float32 numbers do."""
    bits = (values.float() + 0.0).view(torch.int32)  # -0 is +0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@dataclass(frozen=True)
class Screen:
    """Centres of keys, at random within what the facts allow.

    Args:
        centres: [B, stride], bfloat16.
        screened: what bounds their errors.
    """

    centres: Tensor
    screened: Screened

    @classmethod
    def of(cls, x: Tensor, keys: Tensor, width: Tensor, generator: torch.Generator) -> Screen:
        """Return a screen of keys [B, n] that is off by up to `width` [n], times 1 or 3; not of tokens of zeros."""
        (B, n), device = keys.shape, keys.device
        t = 1.0 + 2.0 * (torch.arange(B, device=device) % 2)
        moved = (x != 0).any(1).float()  # NaN moves, too
        share = torch.rand(width.shape, generator=generator, device=device)
        of_tokens = torch.stack([t, moved, 0.5 * moved])
        of_latents = torch.stack([width * share, 2.0 * width * (1 - share)])
        error = (t * moved)[:, None] * width.double()
        centres = keys + (2.0 * torch.rand(keys.shape, generator=generator, device=device) - 1.0) * error
        centres = torch.where(centres.isnan(), torch.inf, centres).to(torch.bfloat16)
        padded = torch.full((B, -(-n // 8) * 8), torch.inf, dtype=torch.bfloat16, device=device)  # not to be read
        padded[:, :n] = centres
        maxima = as_keys(groups_of(centres.float(), n))
        return cls(padded, Screened(maxima, of_tokens * (1 + 2e-7), of_latents, groups_of(of_latents, n)))

    def part(self, start: int, stop: int, device: str) -> Part:
        """Return what the screen says of some tokens."""
        maxima, of_tokens = self.screened.maxima[start:stop], self.screened.of_tokens[:, start:stop].contiguous()
        facts = (self.screened.of_latents, self.screened.of_groups)
        screened = Screened(*(tensor.to(device, copy=True) for tensor in (maxima, of_tokens, *facts)))
        return Part(slice(start, stop), self.centres[start:stop].to(device), None, screened)


def brute_force(pre_acts: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k of each row with the largest keys, lowest of equal ones, NaN the largest; and their values."""
    order = torch.where(keys.isnan(), torch.inf, keys)
    by_value = order.sort(dim=1, descending=True, stable=True).indices
    nan_first = keys.gather(1, by_value).isnan().sort(dim=1, descending=True, stable=True).indices
    indices = by_value.gather(1, nan_first)[:, :k].sort(dim=1).values
    return pre_acts.gather(1, indices), indices

"""Upper bounds of keys, as a screen gives them, and the selection that has to come of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.ops.encode.keys import Keys

GROUP = 32


def exact_pre_acts(x: Tensor, W: Tensor, keys: Keys) -> Tensor:
    """Return [B, n] in float64."""
    return x.double() @ W.double().T + keys.b_enc.double()


def bfloat16_above(values: Tensor) -> Tensor:
    """Return the smallest bfloat16 that is not below; infinity for NaN."""
    near = values.to(torch.bfloat16)
    above = torch.where(near.double() < values, torch.nextafter(near, torch.full_like(near, torch.inf)), near)
    return torch.where(values.isnan(), torch.inf, above)


def maxima_of(upper: Tensor, n: int) -> Tensor:
    """Return integers that order as the largest of each 32 bounds do."""
    padded = F.pad(upper[:, :n].float(), (0, -n % GROUP), value=-torch.inf)
    largest = padded.view(len(upper), -1, GROUP).amax(2) + 0.0  # -0 is +0
    bits = largest.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of keys.

    Args:
        upper: [B, stride], bfloat16.
        maxima: [B, groups], int32.
    """

    upper: Tensor
    maxima: Tensor

    @classmethod
    def of(cls, keys: Tensor, slack: Tensor | float) -> Bounds:
        """Return bounds that lie so far above the keys [B, n]."""
        B, n = keys.shape
        above = bfloat16_above(keys + slack)
        stride = -(-n // 8) * 8
        upper = torch.full((B, stride), torch.inf, dtype=torch.bfloat16, device=keys.device)  # pads are to be ignored
        upper[:, :n] = above
        return cls(upper, maxima_of(upper, n))


def brute_force(pre_acts: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k of each row with the largest keys, lowest of equal ones, NaN the largest; and their values."""
    order = torch.where(keys.isnan(), torch.inf, keys)
    by_value = order.sort(dim=1, descending=True, stable=True).indices
    nan_first = keys.gather(1, by_value).isnan().sort(dim=1, descending=True, stable=True).indices
    indices = by_value.gather(1, nan_first)[:, :k].sort(dim=1).values
    return pre_acts.gather(1, indices), indices

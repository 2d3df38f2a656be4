"""How the parameters of an SAE start: without data, and from some tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.architecture import Parameter
from flashsae.architecture_check import UNIT_ROWS
from flashsae.errors import ConfigError
from flashsae.ops.register import isolated

if TYPE_CHECKING:
    from flashsae.sae.module import SAE


@isolated
@torch.no_grad()
def initialize(sae: SAE, x: Tensor, target: Tensor) -> None:
    """Set b_dec to the mean of what is to be reconstructed, and scale the encoder so that x_hat has the best length.

    With random directions the first reconstruction points the right way but may be far too long or too short; one
    number, the least-squares fit over these tokens, puts that right.

    Args:
        sae: with parameters W_enc_T and b_dec.
        x: [tokens, d_in].
        target: [tokens, d_out].
    """
    sae.b_dec.copy_(target.mean(0, dtype=torch.float64))
    x_hat = sae.decode(sae.encode(x), bias=False).double()
    centered = target.double() - sae.b_dec.double()
    scale = (centered * x_hat).sum() / x_hat.square().sum().clamp_min(1e-300)
    if scale > 0:
        sae.W_enc_T.mul_(scale.to(sae.W_enc_T.dtype))


@isolated
def initial_values(
    table: tuple[Parameter, ...],
    sizes: Mapping[str, int],
    seed: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Return the values that parameters start with, by name; without a seed weights have none."""
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    values = {}
    for row in table:
        shape = row.sizes(sizes)
        if not isinstance(row.initial, str):
            values[row.name] = torch.full(shape, row.initial, dtype=dtype, device=device)
        elif generator is None:
            values[row.name] = torch.empty(shape, dtype=dtype, device=device)
        elif row.initial == UNIT_ROWS:
            rows = torch.empty(shape, dtype=dtype, device="cpu").normal_(generator=generator)
            values[row.name] = F.normalize(rows, dim=1).to(device)
    for row in table:
        if row.name not in values:
            source = values[str(row.initial)]
            if source.shape != row.sizes(sizes):
                raise ConfigError(
                    f"parameter {row.name}: it starts equal to {row.initial}, so expected {list(row.sizes(sizes))} as "
                    f'the shape of that, got {list(source.shape)}. Let it start otherwise, such as with "{UNIT_ROWS}".'
                )
            values[row.name] = source.clone()
    return values

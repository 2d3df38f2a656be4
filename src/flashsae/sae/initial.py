"""How the parameters of an SAE start: without data, and from some tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.architecture import Parameter
from flashsae.architecture.check import UNIT_ROWS
from flashsae.errors import ConfigError
from flashsae.ops.register import isolated

if TYPE_CHECKING:
    from flashsae.sae.module import SAE

DATA_SHARE = 0.8
"""Of the direction of a token in a row that starts from data."""

_ROWS_AT_ONCE = 8192


@isolated
@torch.no_grad()
def initialize(sae: SAE, x: Tensor, target: Tensor) -> None:
    """Set b_dec to the mean of what is to be reconstructed, and scale the encoder so that x_hat has the best length.

    With random directions the first reconstruction points the right way but may be far too long or too short; one
    number, the least-squares fit over these tokens, puts that right.

    Args:
        sae: with parameters W_enc_T, b_enc and b_dec.
        x: [tokens, d_in].
        target: [tokens, d_out].
    """
    if sae.architecture.direct is not None:
        target = target - sae.architecture.direct(sae, x)
    sae.b_dec.copy_(target.mean(0, dtype=torch.float64))
    x_hat = sae.decode(sae.main_part(sae.encode(x)), bias=False).double()
    centered = target.double() - sae.b_dec.double()
    scale = (centered * x_hat).sum() / x_hat.square().sum().clamp_min(1e-300)
    if scale > 0:
        sae.W_enc_T.mul_(scale.to(sae.W_enc_T.dtype))
        sae.b_enc.mul_(scale.to(sae.b_enc.dtype))


@isolated
@torch.no_grad()
def rows_from_data(sae: SAE, x: Tensor, target: Tensor) -> None:
    """Turn the random rows of weights towards tokens: latent i starts with the direction of token i about the mean.

        row_i = unit(0.8 · unit(t_i − mean t) + 0.2 · row_i)

    t is x for weights that read it, such as the encoder of a transcoder, and target for those that write it; both of
    the same token. Parameters that start equal to another one follow it. The random part tells equal tokens apart, and
    latents that share a token where there are more of them than tokens: then each token comes again. A token at the
    mean leaves its rows as they are. Every latent so begins where there is data, and is less likely to be dead.

    Args:
        sae: at its random start. `sae.from_data` is True from then on.
        x: [tokens, d_in], float.
        target: [tokens, d_out]; x itself for an autoencoder.
    Source: starting from data points, blended with random weights, 0.8 to 0.2, is Anthropic's and Peigné's proposal;
        unit norm is ours, since lengths are fitted by `initialize`.
    """
    table = sae.architecture.parameters
    for row in table:
        if row.initial == UNIT_ROWS and row.shape[0] == "d_sae" and row.shape[1] != "d_sae":
            _turn(getattr(sae, row.name), x if row.shape[1] == "d_in" else target)
    sae.from_data = True
    for row in table:
        if isinstance(row.initial, str) and row.initial != UNIT_ROWS:
            getattr(sae, row.name).copy_(getattr(sae, row.initial))


def _turn(rows: Tensor, tokens: Tensor) -> None:
    mean = tokens.mean(0, dtype=torch.float64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        places = torch.arange(start, start + len(part), dtype=torch.int64, device=tokens.device) % len(tokens)
        about = tokens[places].double() - mean
        norm = torch.linalg.vector_norm(about, dim=1, keepdim=True)
        mixed = F.normalize(DATA_SHARE * about / norm + (1 - DATA_SHARE) * part.double(), dim=1)
        part.copy_(torch.where(norm > 1e-12 * torch.linalg.vector_norm(mean), mixed, part.double()))


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

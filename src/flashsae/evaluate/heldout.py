"""Measure an SAE on tokens that training never saw, and describe its latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.data.sources import Source, as_acts, check_finite
from flashsae.errors import ConfigError, DataError
from flashsae.metrics import FVU, LatentActivity
from flashsae.nn.sae import SAE

_COSINE_ROWS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Figures of an SAE on some tokens.

    Args:
        fvu: Σ‖x − x_hat‖² / Σ‖x − mean x‖² over all of them, in float64.
        l0: mean number of active latents (value > 0) a token.
        tokens: how many tokens.
        latent_density: [d_sae], float64, fraction of the tokens on which each latent is active.
    """

    fvu: float
    l0: float
    tokens: int
    latent_density: Tensor


@torch.no_grad()
def evaluate(
    sae: SAE, x: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], *, batch_tokens: int = 4096
) -> Evaluation:
    """Measure an SAE.

    Args:
        sae: on any device.
        x: [tokens, d_in], tensor or numpy, or an iterable of such batches; held-out tokens, if the figures are to
            mean anything.
        batch_tokens: tokens encoded at once.
    Raises:
        DataError: there are no tokens, or one holds NaN or Inf.
        ShapeError, DtypeError: x does not fit the SAE.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens: expected a positive number, got {batch_tokens}.")
    fvu, activity = FVU(), LatentActivity(sae.config.d_sae, sae.W_dec.device)
    for batch in [x] if isinstance(x, Tensor | np.ndarray) else x:
        for part in torch.split(as_acts(batch, "x"), batch_tokens):
            check_finite(part, "x")
            part = part.to(sae.W_dec.device, sae.W_dec.dtype)
            code = sae.encode(part)
            fvu.update(part, sae.decode(code))
            activity.update(code.top_acts, code.top_indices)
    if activity.tokens == 0:
        raise DataError("x is empty: expected at least one token to evaluate on. Give more data or a larger held_out.")
    return Evaluation(fvu.compute(), activity.l0(), activity.tokens, activity.latent_density().cpu())


def held_out_batches(source: Source, max_tokens: int) -> Iterator[Tensor]:
    """Yield the first held-out activations of a source, [n, d_in] each, `max_tokens` in all at most."""
    left = max_tokens
    for chunk, _ in source.chunks("held_out"):
        acts = chunk.acts[:left]
        left -= len(acts)
        if len(acts):
            yield acts
        if left == 0:
            return


@torch.no_grad()
def latent_geometry(sae: SAE) -> dict[str, Tensor]:
    """Describe the directions of an SAE.

    Returns:
        decoder_norm: norm of each row of W_dec.
        encoder_decoder_cosine: cosine between a latent's rows of W_enc_T and W_dec.
        nearest_decoder_cosine: largest cosine of its row of W_dec with that of another latent.
        All [d_sae], float32, on the CPU.
    Cost: 2·d_sae²·d_in FLOPs; 1024 x d_sae values in memory at once.
    """
    rows = F.normalize(sae.W_dec.float(), dim=1)
    nearest = torch.full((len(rows),), -1.0, device=rows.device)
    for start in range(0, len(rows), _COSINE_ROWS):
        cosines = rows[start : start + _COSINE_ROWS] @ rows.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, start + own] = -1.0
        nearest[start : start + _COSINE_ROWS] = cosines.amax(1)
    return {
        "decoder_norm": sae.W_dec.float().norm(dim=1).cpu(),
        "encoder_decoder_cosine": F.cosine_similarity(sae.W_enc_T.float(), sae.W_dec.float()).cpu(),
        "nearest_decoder_cosine": nearest.cpu(),
    }

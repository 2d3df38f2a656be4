"""Units in which an SAE is trained: what may be done to activations before it sees them."""

from __future__ import annotations

from typing import Literal

from flashsae.architecture import Architecture
from flashsae.errors import ConfigError

Normalization = Literal["power_of_two", "none", "mean_square", "layer_norm", "token_norm"]
"""Of a training; the first three are factors, which are folded into the parameters at its end."""

LAYER_NORM, TOKEN_NORM = "layer_norm", "token_norm"
BY_TOKEN = (LAYER_NORM, TOKEN_NORM)
"""What an SAE does to each token by itself, and undoes of its reconstruction."""

_UNDONE_WITH = {LAYER_NORM: "mean and the deviation", TOKEN_NORM: "norm"}


def check_normalization(architecture: Architecture, normalization: str | None, width: int | None) -> None:
    """Raise ConfigError where tokens cannot be normalised: by statistics that nobody knows, or that there are not.

    Each of several sites is normalised by itself, where what is read is what is reconstructed.

    Args:
        architecture: whose sites they are.
        normalization: of the settings.
        width: of the narrowest site.
    """
    if normalization not in BY_TOKEN:
        return
    if architecture.reads != architecture.writes or len(architecture.sites) > 1:
        raise ConfigError(
            f"normalize_activations: {normalization} is undone with the {_UNDONE_WITH[normalization]} of the token "
            f"that is read, and {architecture.title} reads or reconstructs others beside it. Take mean_square, which "
            "has a scale for each site."
        )
    if width == 1 and normalization == LAYER_NORM:
        raise ConfigError("normalize_activations: expected layer_norm of at least two coordinates a site, got 1.")


def check_b_dec(architecture: Architecture, applied: bool | None) -> None:
    """Raise ConfigError where a b_dec is to be subtracted that the encoder has no place for.

    Args:
        architecture: of the SAE.
        applied: as of `flashsae.SAEConfig`.
    """
    if applied and not architecture.subtracts_b_dec:
        raise ConfigError(
            f"apply_b_dec_to_input: {architecture.title} subtracts no b_dec from what it encodes: leave it out."
        )

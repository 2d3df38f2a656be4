"""Units in which an SAE is trained: what may be done to activations before it sees them."""

from __future__ import annotations

from typing import Literal

from flashsae.architecture import Architecture
from flashsae.errors import ConfigError

Normalization = Literal["power_of_two", "none", "mean_square", "layer_norm"]
"""Of a training; the first three are factors, which are folded into the parameters at its end."""

LAYER_NORM = "layer_norm"


def check_normalization(architecture: Architecture, normalization: str | None, width: int | None) -> None:
    """Raise ConfigError where tokens cannot be normalised: by statistics that nobody knows, or that there are not.

    Each of several sites is normalised by itself, where what is read is what is reconstructed.

    Args:
        architecture: whose sites they are.
        normalization: of the settings.
        width: of the narrowest site.
    """
    if normalization != LAYER_NORM:
        return
    if architecture.reads != architecture.writes or len(architecture.sites) > 1:
        raise ConfigError(
            "normalize_activations: layer_norm is undone with the mean and the deviation of the token that is read, "
            f"and {architecture.title} reads or reconstructs others beside it. Take mean_square, which has a scale for "
            "each site."
        )
    if width == 1:
        raise ConfigError("normalize_activations: expected layer_norm of at least two coordinates a site, got 1.")

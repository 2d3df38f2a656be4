"""Units in which an SAE is trained: what may be done to activations before it sees them."""

from __future__ import annotations

from typing import Literal

from flashsae.architecture import Architecture
from flashsae.errors import ConfigError

Normalization = Literal["power_of_two", "none", "mean_square", "layer_norm"]
"""Of a training; the first three are factors, which are folded into the parameters at its end."""

LAYER_NORM = "layer_norm"


def check_normalization(architecture: Architecture, normalization: str | None) -> None:
    """Raise ConfigError where each token is to be normalised by statistics that nobody knows in inference."""
    if normalization != LAYER_NORM or len(architecture.sites) == 1:
        return
    raise ConfigError(
        f"normalize_activations: layer_norm is undone with the mean and the deviation of the token that is read, and "
        f"{architecture.title} reconstructs others, whose statistics the SAE cannot know. Take mean_square, which has a "
        "scale for each site."
    )

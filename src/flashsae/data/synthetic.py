"""Activations with known ground truth: more directions than dimensions, few of them active at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import ConfigError


class SuperpositionModel:
    """A toy model of superposition: x = Σ over the active directions of magnitude · direction + noise.

    Each direction is active independently, `active` of them on average; magnitudes are uniform between 0.5 and 1.5.

    Args:
        d_in: width of the activations.
        n_directions: unit vectors drawn at random; more than d_in makes superposition.
        active: mean number of directions in a token.
        noise: standard deviation of Gaussian noise on each coordinate.
        seed: of the directions.
    Source: after Elhage et al. 2022, "Toy Models of Superposition", and Sharkey et al. 2022.
    """

    def __init__(self, d_in: int, n_directions: int, *, active: float = 8.0, noise: float = 0.0, seed: int = 0) -> None:
        if not 0 < active <= n_directions:
            raise ConfigError(f"active: expected 0 < active <= n_directions = {n_directions}, got {active}.")
        generator = torch.Generator().manual_seed(seed)
        self.directions = F.normalize(
            torch.randn(n_directions, d_in, generator=generator, dtype=torch.float32, device="cpu"), dim=1
        )
        """[n_directions, d_in], unit rows: what an SAE should find."""
        self._probability = active / n_directions
        self._noise = noise

    def sample(self, tokens: int, *, seed: int) -> Tensor:
        """Return activations: [tokens, d_in], float32."""
        generator = torch.Generator().manual_seed(seed)
        n, d_in = self.directions.shape
        is_active = torch.rand(tokens, n, generator=generator, dtype=torch.float32, device="cpu") < self._probability
        magnitude = torch.rand(tokens, n, generator=generator, dtype=torch.float32, device="cpu") + 0.5
        noise = torch.randn(tokens, d_in, generator=generator, dtype=torch.float32, device="cpu") * self._noise
        return (is_active * magnitude) @ self.directions + noise

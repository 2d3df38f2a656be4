"""Metrics over a whole set, accumulated batch by batch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.shapes import Activations, TopActs, TopIndices


class FVU:
    """Fraction of variance unexplained, Σ‖x − x_hat‖² / Σ‖x − mean x‖², means over the whole set.

    The two sums are over every token that was given to `update`, not means of batches.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._residual = 0.0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._square = 0.0

    def update(self, x: Activations, x_hat: Activations) -> None:
        """Add a batch: x and x_hat, both [B, d_in]."""
        if len(x) == 0:
            return
        x64 = x.detach().double()
        if self._shift is None:
            # near the mean, so that the difference of large squares below loses nothing
            self._shift = x64.mean(0)
            self._sum = torch.zeros_like(self._shift)
        self._residual += (x64 - x_hat.detach().double()).square().sum().item()
        shifted = x64 - self._shift
        self._sum += shifted.sum(0)
        self._square += shifted.square().sum().item()
        self._tokens += len(x)

    def compute(self) -> float:
        """Return the FVU; NaN without tokens, infinity if x does not vary and is not met exactly."""
        if self._tokens == 0:
            return float("nan")
        variance = self._square - self._sum.square().sum().item() / self._tokens
        if variance <= 0.0:
            return 0.0 if self._residual == 0.0 else float("inf")
        return self._residual / variance


def count_active(counts: Tensor, top_acts: TopActs, top_indices: TopIndices) -> Tensor:
    """Add to `counts` ([d_sae], int64, in place) on how many tokens each latent is active; selected with 0 is not."""
    return counts.scatter_add_(0, top_indices.flatten().long(), (top_acts > 0).flatten().long())


class LatentActivity:
    """How often each latent is active (value > 0), and so L0 and the dead latents of a set.

    Args:
        d_sae: number of latents.
        device: where codes come from.
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._tokens = 0

    def update(self, top_acts: TopActs, top_indices: TopIndices) -> None:
        """Add the codes of a batch: both [B, k]."""
        count_active(self._fired, top_acts, top_indices)
        self._tokens += len(top_acts)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._tokens

    def latent_density(self) -> Tensor:
        """Return the fraction of tokens on which each latent is active: [d_sae], float64."""
        return self._fired.double() / max(self._tokens, 1)

    def l0(self) -> float:
        """Return the mean number of active latents a token."""
        return self._fired.sum().item() / max(self._tokens, 1)


def direction_recovery(W_dec: Tensor, directions: Tensor, cosine: float = 0.95) -> float:
    """Return the fraction of known directions that some decoder row matches.

    Args:
        W_dec: [d_sae, d_in].
        directions: [n, d_in], the ground truth.
        cosine: a direction counts as recovered if its largest cosine with a row of W_dec is above this.
    """
    rows = torch.nn.functional.normalize(W_dec.detach().double(), dim=1)
    truth = torch.nn.functional.normalize(directions.double().to(rows.device), dim=1)
    return (truth @ rows.T).amax(1).gt(cosine).double().mean().item()

"""Variance, and what of it is unexplained, over a whole set: accumulated batch by batch in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.metrics.table import OUTLIER_NORM_RATIO
from flashsae.shapes import Activations

_ROUNDING = 4 * torch.finfo(torch.float64).eps


class FVU:
    """Fraction of variance unexplained, Σ‖x − x_hat‖² / Σ‖x − mean x‖², means over the whole set.

    The two sums are over every token that was given to `update`, not means of batches. Both are taken in float64;
    squares only of deviations from a mean nearby, so a large common offset costs no digits, and in a unit in which they
    neither overflow nor vanish.

    Source: batches are combined as in Chan, Golub and LeVeque 1983.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._residual = 0.0
        self._deviations = 0.0
        self._mean: Tensor | None = None
        self._unit = 0.0

    def update(self, x: Activations, x_hat: Activations) -> None:
        """Add a batch: x and x_hat, both [B, d_in], any float dtypes; neither is rounded."""
        if len(x) == 0:
            return
        x64 = x.detach().double()
        error = x_hat.detach().double() - x64
        if self._unit == 0.0:
            self._unit = unit_of(torch.stack([x64.abs().amax(), error.abs().amax()]).amax().item())
        unit = self._unit or 1.0
        self._residual += (error * unit).square().sum().item()
        x64 = x64 * unit
        mean = x64.mean(0)
        rounded_off = (x64 - mean).mean(0)  # what the sum behind the mean lost beside a large offset
        mean = mean + rounded_off
        deviations = (x64 - mean).square().sum().item()
        tokens = self._tokens + len(x)
        if self._mean is None:
            self._mean = mean
        else:
            apart = mean - self._mean
            deviations += apart.square().sum().item() * self._tokens * len(x) / tokens
            self._mean = self._mean + apart * (len(x) / tokens)
        self._deviations += deviations
        self._tokens = tokens

    def compute(self) -> float:
        """Return the FVU; NaN without tokens, infinity if x does not vary and is not met exactly."""
        if self._mean is None:
            return float("nan")
        if self._deviations <= self._tokens * self._mean.mul(_ROUNDING).square().sum().item():
            return 0.0 if self._residual == 0.0 else float("inf")
        return self._residual / self._deviations


def unit_of(largest: float) -> float:
    """Return the power of two that brings a number near 1; 0 for 0."""
    return math.ldexp(1.0, min(1000, -math.frexp(largest)[1])) if largest else 0.0


@dataclass(frozen=True)
class VarianceSpread:
    """How the variance of some tokens is spread over them. Shares are of Σ‖x − mean x‖², squares taken in float64.

    Args:
        tokens: how many.
        top_permille: share held by the thousandth of the tokens that is farthest from the mean (0 below 1000 tokens).
        top_percent: share held by the hundredth (0 below 100 tokens).
        largest_ratio: largest norm over the median norm.
        outliers: tokens whose norm exceeds 10 times the median.
        outlier_share: share that they hold.
    """

    tokens: int
    top_permille: float
    top_percent: float
    largest_ratio: float
    outliers: int
    outlier_share: float

    @property
    def is_concentrated(self) -> bool:
        """Whether few tokens hold most of the variance: the top hundredth, or the outliers, more than half of it."""
        return max(self.top_percent, self.outlier_share) > 0.5


@torch.no_grad()
def variance_spread(x: Activations) -> VarianceSpread:
    """Measure how the variance of tokens is spread over them.

    Args:
        x: [B, d_in], B > 0, of a size whose squares float64 holds.
    """
    x64 = x.detach().double()
    norms, squares = x64.norm(dim=1), (x64 - x64.mean(0)).square().sum(1)
    total = max(squares.sum().item(), 1e-300)
    descending = squares.sort(descending=True).values
    is_outlier = norms > norm_limit(norms)
    return VarianceSpread(
        tokens=len(x),
        top_permille=descending[: len(x) // 1000].sum().item() / total,
        top_percent=descending[: len(x) // 100].sum().item() / total,
        largest_ratio=norms.amax().item() / max(norms.median().item(), 1e-300),
        outliers=int(is_outlier.sum()),
        outlier_share=squares[is_outlier].sum().item() / total,
    )


def norm_limit(norms: Tensor) -> float:
    """Return the norm above which a token is an outlier: 10 times the median of `norms`; infinity if that is 0."""
    median = norms.median().item() if len(norms) else 0.0
    return OUTLIER_NORM_RATIO * median if median > 0.0 else math.inf

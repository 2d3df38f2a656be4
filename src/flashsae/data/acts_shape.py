"""What activations look like: norms by position, mean and spread, outliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashsae.metrics import OUTLIER_NORM_RATIO

OUTLIER_DIMENSION_RATIO = 6.0
"""A dimension whose root mean square is so many times the median over dimensions is called an outlier."""
_GRAM_ROWS = 2048
_FEWEST_ROWS = 64
_LISTED = 8


@dataclass(frozen=True)
class Positions:
    """Tokens at neighbouring positions of the inputs of the model.

    Args:
        first, last: of them.
        rows: of the sample.
        norm: median of ‖x‖.
        ratio: of it to the median over all positions.
    """

    first: int
    last: int
    rows: int
    norm: float
    ratio: float


@dataclass(frozen=True)
class OutlierDimension:
    """A dimension that is larger than others.

    Args:
        dimension: its number.
        ratio: of its root mean square to the median over dimensions.
        share: of Σ‖x‖².
        mean_share: of its own square that its mean has: near 1 where it is large and does not vary.
    """

    dimension: int
    ratio: float
    share: float
    mean_share: float


@dataclass(frozen=True)
class OutlierTokens:
    """Tokens whose norm exceeds `OUTLIER_NORM_RATIO` times the median.

    Args:
        rows: how many of the sample.
        share: of Σ‖x − mean‖².
        commonest: ids of the commonest of them, and how often each comes; at most 8.
    """

    rows: int
    share: float
    commonest: list[tuple[int, int]]


@dataclass(frozen=True)
class Shape:
    """What activations look like.

    Args:
        norm: median of ‖x‖; mean_norm, largest_norm: likewise.
        mean_share: ‖mean‖² as a fraction of the mean of ‖x‖².
        variance: of a token: the mean of ‖x − mean‖².
        effective_dimensions: (Σλ)²/Σλ² over the eigenvalues of the covariance; None of too few rows.
        constant_dimensions: how many dimensions do not vary.
        outlier_dimensions: the largest ones, at most 8, and how many there are in all.
        n_outlier_dimensions: in all.
        outlier_tokens: what there is of such.
        positions: norms by position; attention sinks stand out.
    """

    norm: float
    mean_norm: float
    largest_norm: float
    mean_share: float
    variance: float
    effective_dimensions: float | None
    constant_dimensions: int
    outlier_dimensions: list[OutlierDimension]
    n_outlier_dimensions: int
    outlier_tokens: OutlierTokens
    positions: list[Positions]


def shape_of(x: Tensor, ids: Tensor, positions: Tensor) -> Shape:
    """Look at activations.

    Args:
        x: [n, d], float32, finite, n > 0.
        ids: [n], of their tokens.
        positions: [n], of their tokens.
    """
    mean, square = x.mean(0, dtype=torch.float64), torch.stack(list(_squares(x))).sum(0) / len(x)
    centred = torch.stack(list(_squares(x, mean))).sum(0) / len(x)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    norm, total = norms.median().item(), square.sum().item()
    outliers = _outlier_dimensions(mean, square)
    return Shape(
        norm=norm,
        mean_norm=norms.mean().item(),
        largest_norm=norms.max().item(),
        mean_share=mean.square().sum().item() / total if total else 0.0,
        variance=centred.sum().item(),
        effective_dimensions=_effective_dimensions(x, mean),
        constant_dimensions=int((x.amax(0) == x.amin(0)).sum()),
        outlier_dimensions=outliers[:_LISTED],
        n_outlier_dimensions=len(outliers),
        outlier_tokens=_outlier_tokens(x, mean, norms, ids),
        positions=_by_position(norms, positions, norm),
    )


def spread_over(n: int, most: int) -> list[int]:
    """Return up to so many of the numbers below n, at equal distances."""
    return sorted({round(each) for each in np.linspace(0, n - 1, min(n, most)).tolist()})


def _outlier_dimensions(mean: Tensor, square: Tensor) -> list[OutlierDimension]:
    """Return the dimensions that are larger than others, the largest first."""
    rms, total = square.sqrt(), square.sum().item()
    ratio = rms / rms.median() if rms.median() > 0 else torch.where(rms > 0, torch.inf, 0.0)
    outliers = (ratio > OUTLIER_DIMENSION_RATIO).nonzero()[:, 0]
    return [
        OutlierDimension(
            each, ratio[each].item(), square[each].item() / total, mean[each].item() ** 2 / square[each].item()
        )
        for each in outliers[ratio[outliers].argsort(descending=True, stable=True)].tolist()
    ]


def _outlier_tokens(x: Tensor, mean: Tensor, norms: Tensor, ids: Tensor) -> OutlierTokens:
    large = norms > OUTLIER_NORM_RATIO * norms.median() if norms.median() > 0 else norms < 0
    variance = (x.double() - mean).square().sum(1)
    share = (variance[large].sum() / variance.sum()).item() if variance.sum() > 0 else 0.0
    return OutlierTokens(int(large.sum()), share, Counter(ids[large].tolist()).most_common(_LISTED))


def _squares(x: Tensor, mean: Tensor | None = None) -> Iterator[Tensor]:
    """Yield Σ(x − mean)² of each dimension, part by part, in float64."""
    for row in range(0, len(x), 4096):
        part = x[row : row + 4096].double()
        yield (part if mean is None else part - mean).square().sum(0)


def _effective_dimensions(x: Tensor, mean: Tensor) -> float | None:
    """Return (Σλ)²/Σλ² of the covariance, without the bias of a sample: Σλ² from pairs of different rows."""
    sample = x[torch.tensor(spread_over(len(x), _GRAM_ROWS), dtype=torch.int64, device="cpu")].double() - mean
    if len(sample) < _FEWEST_ROWS:
        return None
    gram = sample @ sample.T
    own, n = gram.diagonal(), len(sample)
    squares = (gram.square().sum() - own.square().sum()).item() / (n * (n - 1))
    return min(own.mean().item() ** 2 / squares, float(x.shape[1])) if squares > 0 else None


def _by_position(norms: Tensor, positions: Tensor, norm: float) -> list[Positions]:
    """Return the norms at the first four positions, and at as many as lie before them from there on."""
    found, first, width = list[Positions](), 0, 1
    while first <= int(positions.max()):
        here = norms[(positions >= first) & (positions < first + width)]
        if len(here):
            median = here.median().item()
            found.append(Positions(first, first + width - 1, len(here), median, median / norm if norm else 1.0))
        first += width
        width = 1 if first < 4 else first
    return found

"""What a few thousand tokens tell before a training: its unit, its variance, and whether few tokens are most of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flashsae.errors import DataError
from flashsae.metrics import OUTLIER_NORM_RATIO, VarianceSpread, unit_of, variance_spread
from flashsae.sae.losses import token_variance

LARGEST, SMALLEST = 2.0**120, 2.0**-100
"""Activations beyond are refused: the values of latents have their unit, and are float32."""

MOST_ROUNDED = 0.01
"""Share of the variance that float32 may round away without a warning."""


@dataclass(frozen=True)
class Sample:
    """What a training goes by.

    Args:
        x: [n, d_in], float32, times `scale`: as the training sees it.
        scale: the power of two that brings the standard deviation of a coordinate next to 1/4. Weights have no unit,
            since decoder rows have norm 1; biases have that of x, and Adam moves them by about lr a step. Multiplying
            by a power of two rounds nothing, so the finished SAE is exactly the one that was trained.
        variance: of a token of `x`, what the loss is relative to.
        warnings: sentences for the user.
    """

    x: Tensor
    scale: float
    variance: float
    warnings: tuple[str, ...] = ()


def measure_sample(x: Tensor) -> Sample:
    """Measure what a training goes by.

    Args:
        x: [n, d_in], float64, training tokens as they come.
    Raises:
        DataError: the tokens do not vary, or are too large or too small for float32.
    """
    largest = x.abs().amax().item() if x.numel() else 0.0
    if largest and not SMALLEST <= largest <= LARGEST:
        raise DataError(
            f"the activations reach {largest:.1e}, where float32, in which an SAE is trained and saved, has no room "
            f"for it: multiply them by a constant first, such as {unit_of(largest):.1e}."
        )
    exponent = math.frexp(largest)[1]
    near_one = x * 2.0**-exponent
    whole = token_variance(near_one)
    if whole == 0.0:
        raise DataError(
            f"the activations do not vary: {len(x):,} sampled tokens are equal, so there is nothing for an SAE to "
            "explain. Check where they come from."
        )
    scale = 2.0 ** (round(math.log2(x.shape[1] / whole) / 2 - 2) - exponent)
    seen = (x * scale).float()
    variance = token_variance(seen)
    rounded = (seen.double() - x * scale).square().sum(1).mean().item()
    if variance == 0.0 or rounded > 0.5 * variance:
        raise DataError(
            f"the activations vary less than float32 resolves beside values of {largest:.1e}: subtract their mean "
            "before, in float64."
        )
    spread = variance_spread(near_one)
    warnings = [_concentration(spread)] if spread.is_concentrated else []
    if rounded > MOST_ROUNDED * variance:
        warnings.append(
            f"float32 rounds the activations by {rounded / variance:.1%} of their variance, since they vary little "
            f"beside values of {largest:.1e}: subtract their mean before, in float64."
        )
    return Sample(seen, scale, variance, tuple(warnings))


def _concentration(spread: VarianceSpread) -> str:
    if spread.outlier_share > 0.5:
        who = (
            f"{spread.outliers:,} of {spread.tokens:,} sampled tokens, with norms above {OUTLIER_NORM_RATIO:.0f} times"
        )
        figures = f"{who} the median, hold {spread.outlier_share:.1%} of the variance"
    else:
        figures = (
            f"the top 1 % of the sampled tokens hold {spread.top_percent:.1%} of the variance, and the top 0.1 % "
            f"{spread.top_permille:.1%}"
        )
    return (
        f"{figures} (largest norm: {spread.largest_ratio:,.0f} times the median), so loss and FVU are mostly about "
        "these few. Often they are the first tokens of texts. To leave them out, flashsae train and cache take "
        f"--max-norm-ratio {OUTLIER_NORM_RATIO:.0f}, --skip-first, --exclude-ids and --no-prepend-bos; of an array, "
        "drop these rows before fit."
    )

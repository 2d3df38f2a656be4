"""What a few thousand tokens tell before a training: its unit, its variance, and whether few tokens are most of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.architecture import X_MEAN, Architecture
from flashsae.data.acts import Batch
from flashsae.errors import DataError
from flashsae.metrics import OUTLIER_NORM_RATIO, VarianceSpread, unit_of, variance_spread
from flashsae.sae.losses import token_variance
from flashsae.sae.step import join_sites
from flashsae.sae.units import EPS, normalized
from flashsae.settings.normalization import BY_TOKEN, LAYER_NORM, TOKEN_NORM, Normalization
from flashsae.train.scaling import Scaling, SiteScale

LARGEST, SMALLEST = 2.0**120, 2.0**-100
"""Activations beyond are refused: the values of latents have their unit, and are float32."""

MOST_ROUNDED = 0.01
"""Share of the variance that float32 may round away without a warning."""


WITHIN = 2.0**40
"""What is not scaled is refused beyond, or below its reciprocal: float32 has no room for the squares."""

LEAST_BESIDE_MEAN = 2.0**-24
"""Of squares: a site that deviates less from its mean hardly varies in float32, and is not brought to the others."""

LEAST_DEVIATION = 1e-4
"""Tokens that deviate less from their mean, in the root mean square, are not normalised: see `layer_norm`."""


@dataclass(frozen=True)
class Sample:
    """What a training goes by.

    Args:
        x: [n, d_in], float32, as the SAE will see it.
        target: [n, d_out], the same of what is reconstructed; x itself for an autoencoder.
        scaling: what makes it so of activations as they come.
        variance: of a token of `target`, what the loss is relative to.
        warnings: sentences for the user.
    """

    x: Tensor
    target: Tensor
    scaling: Scaling
    variance: float
    warnings: tuple[str, ...] = ()


def measure_sample(batch: Batch, architecture: Architecture, normalization: Normalization = "power_of_two") -> Sample:
    """Measure what a training goes by.

    With "power_of_two", the factor is the power of two that brings the standard deviation of a coordinate of what is
    reconstructed next to 1/4. Weights have no unit, since decoder rows have norm 1; biases have that of x, and Adam
    moves them by about lr a step. Multiplying by a power of two rounds nothing, so the finished SAE is exactly the one
    that was trained. Sites that are only read have a power of two of their own.

    With "mean_square", each site has the factor that makes the mean square of its coordinates 1: about their mean where
    that is longer than they deviate from it, and the architecture sees them about it (`flashsae.sae.centring`). The
    loss is of the deviations, so a site with a long mean would else weigh next to nothing beside others.

    Args:
        batch: [n, d] by site, float64, training tokens as they come.
        architecture: says which sites are read and written.
        normalization: of the settings.
    Raises:
        DataError: the tokens do not vary, or are too large or too small for float32.
    """
    x, target = join_sites(architecture, batch)
    reads, writes = ([(site, batch[site]) for site in sites] for sites in architecture.sites_of(batch))
    widths = [acts.shape[1] for _, acts in writes]
    warnings, two = _check(
        target, normalized(normalization, target, widths=widths) if normalization in BY_TOKEN else target
    )
    if normalization == "none":
        _check_unscaled(x, target)
    if normalization == LAYER_NORM:
        for _, acts in reads:
            _check_deviation(acts)
    others = [acts for site, acts in reads if site not in dict(writes)]
    two_of_others = _power_of_two(torch.cat(others, 1), "the activations that are read") if others else two

    for site, acts in writes if len(writes) > 1 else ():
        if bool((acts == acts[0]).all()):
            raise DataError(_EQUAL.format(what=f"the activations of {site}", n=len(x)))
    centres = X_MEAN.name in (row.name for row in architecture.parameters)

    def scale(site: str, acts: Tensor) -> SiteScale:
        if normalization == "mean_square":
            return SiteScale(acts.shape[1], _unit_mean_square(site, acts, about_mean=centres))
        if normalization == "power_of_two":
            return SiteScale(acts.shape[1], two if site in dict(writes) else two_of_others)
        return SiteScale(acts.shape[1], 1.0)

    scaling = Scaling(
        tuple(scale(*each) for each in reads),
        tuple(scale(*each) for each in writes),
        is_layer_norm=normalization == LAYER_NORM,
        is_token_norm=normalization == TOKEN_NORM,
    )
    seen = scaling(x, target)
    variance = token_variance(seen[1])
    if variance == 0.0:
        raise DataError(_EQUAL.format(what="the activations", n=len(x)))
    return Sample(*seen, scaling, variance, warnings)


def _check(x: Tensor, learnt: Tensor) -> tuple[tuple[str, ...], float]:
    """Return warnings of what is to be reconstructed, and its power of two.

    Args:
        x: [n, d_out], float64.
        learnt: the same in proportions of which the loss is, x itself unless tokens are normalised.
    """
    scale = _power_of_two(x, "the activations")
    largest = x.abs().amax().item()
    seen = (x * scale).float()
    variance = token_variance(seen)
    rounded = (seen.double() - x * scale).square().sum(1).mean().item()
    if variance == 0.0 or rounded > 0.5 * variance:
        raise DataError(
            f"the activations vary less than float32 resolves beside values of {largest:.1e}: subtract their mean "
            "before, in float64."
        )
    spread = variance_spread(learnt * 2.0 ** -math.frexp(learnt.abs().amax().item())[1])
    warnings = [_concentration(spread)] if spread.is_concentrated else []
    if rounded > MOST_ROUNDED * variance:
        warnings.append(
            f"float32 rounds the activations by {rounded / variance:.1%} of their variance, since they vary little "
            f"beside values of {largest:.1e}: subtract their mean before, in float64."
        )
    return tuple(warnings), scale


_EQUAL = (
    "{what} do not vary: {n:,} sampled tokens are equal, so there is nothing for an SAE to explain. Check where they "
    "come from."
)


def _power_of_two(x: Tensor, what: str) -> float:
    """Return the power of two that brings the standard deviation of a coordinate next to 1/4."""
    largest = x.abs().amax().item() if x.numel() else 0.0
    if largest and not SMALLEST <= largest <= LARGEST:
        raise DataError(
            f"{what} reach {largest:.1e}, where float32, in which an SAE is trained and saved, has no room "
            f"for it: multiply them by a constant first, such as {unit_of(largest):.1e}."
        )
    exponent = math.frexp(largest)[1]
    whole = token_variance(x * 2.0**-exponent)
    if whole == 0.0:
        raise DataError(_EQUAL.format(what=what, n=len(x)))
    return 2.0 ** (round(math.log2(x.shape[1] / whole) / 2 - 2) - exponent)


def _unit_mean_square(site: str, x: Tensor, *, about_mean: bool) -> float:
    """Return what makes the mean square of a coordinate 1, as a float32 number; may be about a mean that is longer."""
    mean_square, of_mean = x.square().mean().item(), x.mean(0).square().mean().item()
    if mean_square == 0.0:
        raise DataError(f"the activations of {site} are all 0, so no factor gives them a unit mean square.")
    deviation = token_variance(x) / x.shape[1]
    if about_mean and of_mean * LEAST_BESIDE_MEAN < deviation < of_mean:
        mean_square = deviation
    return torch.tensor(mean_square**-0.5, dtype=torch.float32, device="cpu").item()


def _check_unscaled(*sites: Tensor) -> None:
    for x in sites:
        largest = x.abs().amax().item()
        if not 1 / WITHIN <= largest <= WITHIN:
            raise DataError(
                f"the activations reach {largest:.1e}, which float32 has no room to square: normalize_activations none "
                "leaves them as they are, and power_of_two or mean_square would not."
            )


def _check_deviation(x: Tensor) -> None:
    deviation = x.var(dim=1).mean().sqrt().item()
    if deviation < LEAST_DEVIATION:
        raise DataError(
            f"the coordinates of a token deviate by {deviation:.1e} from their mean, to which layer_norm adds "
            f"{EPS:.0e} before it divides: multiply the activations by a constant first."
        )


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

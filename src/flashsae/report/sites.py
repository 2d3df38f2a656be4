"""The figure of an SAE of several sites: over which of them its latents are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashsae.metrics.numbers import real
from flashsae.report.cards import printable
from flashsae.report.drawing import Array, histogram, shares
from flashsae.report.plots import Plot

_CELLS = 1500
"""Cells that a figure has at most."""
_COLUMNS = 96
_ALONE = 0.1
"""Share of its norm up to which a latent is as good as absent from a site."""
_LONGEST = 24
_TOLD = 6
"""Sites that a caption counts latents at, one by one, at most."""


def sites_of(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the widths of the sites by name, of the settings of an architecture that takes any sites; {} of others."""
    widths, names = settings.get("widths"), settings.get("sites")
    if not isinstance(widths, list | tuple) or any(real(width) is None for width in widths):
        return {}
    if not isinstance(names, list | tuple) or len(set(map(str, names))) != len(widths):
        names = [f"site {number}" for number in range(len(widths))]
    return {str(name): float(width) for name, width in zip(names, widths)}


def site_plots(arrays: Mapping[str, Array], sites: list[str]) -> list[Plot]:
    """Draw over which sites latents are spread: none where there is one site, or norms are not known.

    Args:
        arrays: site_norms, [d_sae, sites], and is_dead, [d_sae], where they are known.
        sites: their names.
    Raises:
        MissingExtraError: matplotlib is not installed.
    Source: Lindsey et al. 2024, relative decoder norms.
    """
    norms = arrays.get("site_norms")
    if norms is None or len(sites) < 2 or norms.shape[1] != len(sites):
        return []
    whole = norms.sum(1)
    used = np.isfinite(norms).all(1) & (whole > 0)
    dead = arrays["is_dead"] > 0 if "is_dead" in arrays else np.zeros(len(norms), dtype=bool)
    left_out = f" {int((used & dead).sum()):,} dead ones are left out." if (used & dead).any() else ""
    used &= ~dead
    parts = norms[used] / whole[used, None]
    sites = [printable(name) for name in sites]
    named = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in sites]
    draw = _of_two if len(sites) == 2 else _of_more
    caption, svg = draw(parts, named)
    unit = "Norms are in the unit in which each site was trained."
    return [Plot("sites", "Decoder norms by site", f"{caption}{left_out} {unit}", svg)]


def _of_two(parts: Array, sites: list[str]) -> tuple[str, str]:
    first, second = sites
    share = parts[:, 1]
    low, high = int((share < _ALONE).sum()), int((share > 1 - _ALONE).sum())
    caption = (
        f"Relative norm ‖d₂‖ / (‖d₁‖ + ‖d₂‖) of the decoder of each latent, of {first} (1) and {second} (2): 0 is a "
        f"latent of {first} alone, 1 one of {second} alone, 0.5 one of both. Of {len(share):,}, {low:,} are below "
        f"{_ALONE}, {len(share) - low - high:,} between, {high:,} above {1 - _ALONE}."
    )
    return caption, histogram("sites", share, f"{first}  ←  relative norm  →  {second}", left=0.0, right=1.0)


def _of_more(parts: Array, sites: list[str]) -> tuple[str, str]:
    place = parts @ np.arange(len(sites))
    ordered = parts[np.argsort(place, kind="stable")]
    groups = np.array_split(ordered, max(1, min(len(ordered), _COLUMNS, _CELLS // len(sites))))
    means = np.array([group.mean(0) if len(group) else np.zeros(len(sites)) for group in groups])
    most, alone = np.bincount(parts.argmax(1), minlength=len(sites)), int((parts > 1 - _ALONE).sum())
    largest = ", ".join(f"{count:,} at {site}" for count, site in zip(most, sites))
    told = f"Latents are largest at these sites: {largest}; " if len(sites) <= _TOLD else ""
    size = -(-len(ordered) // len(groups))
    each = "a latent" if size <= 1 else f"the mean of about {size:,} latents"
    caption = (
        f"Share of each site in the decoder norms of a latent, ‖d_s‖ / Σ‖d_s‖. A column is {each}, from those of the "
        f"first sites to those of the last; the fullest shade is {means.max(initial=0.0):.2f}, no shade 0. {told}"
        f"{alone:,} of {len(parts):,} have more than {1 - _ALONE} at one site."
    )
    return caption, shares("sites", means.T, sites, "latents, by their mean site")

"""Nested dictionaries as settings name them, and as numbers of latents."""

from __future__ import annotations

from collections.abc import Sequence

from flashsae.errors import ConfigError


def prefixes_of(prefixes: Sequence[float], d_sae: int) -> list[int]:
    """Return prefixes as numbers of latents. Fractions that make the same number of so few latents count once.

    Raises:
        ConfigError: a number of latents is none, or the last prefix does not have them all.
    """
    last = prefixes[-1]
    is_share = [each < 1 or each == last == 1 for each in prefixes]  # before others 1 is one latent
    sizes = sorted({max(1, round(each * d_sae)) if share else round(each) for each, share in zip(prefixes, is_share)})
    if any(each > 1 and each != round(each) for each in prefixes) or sizes[-1] != d_sae:
        raise ConfigError(
            f"prefixes: expected fractions up to 1 or whole numbers of latents, of which the last is 1 or {d_sae} as "
            f"d_sae, got {list(prefixes)}."
        )
    return sizes

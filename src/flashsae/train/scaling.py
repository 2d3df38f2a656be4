"""What a training does to activations before its SAE sees them, and how the finished SAE does without."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.files.schema import Positive, Size
from flashsae.sae.module import SAE
from flashsae.sae.units import Units, normalized
from flashsae.settings.normalization import LAYER_NORM, TOKEN_NORM


@dataclass(frozen=True)
class SiteScale:
    """What the activations of a site are multiplied by.

    Args:
        width: of the site.
        factor: one float32 number, so that activations of any dtype that hold the same numbers become the same.
    """

    width: Size
    factor: Positive


@dataclass(frozen=True)
class Scaling:
    """How activations become what an SAE in training sees: x times a factor of its site, or normalised by token.

    Args:
        reads: each site that goes in, in the order in which they stand beside each other.
        writes: the same of what is reconstructed.
        is_layer_norm: whether each token is normalised, at each site by itself, by `flashsae.sae.units.layer_norm`;
            factors are 1 then.
        is_token_norm: the same, by the norm of each token alone.
    """

    reads: tuple[SiteScale, ...]
    writes: tuple[SiteScale, ...]
    is_layer_norm: bool = False
    is_token_norm: bool = False

    @property
    def by_token(self) -> str | None:
        """What is done to each token by itself, as of `flashsae.SAEConfig`; None where there are factors."""
        return LAYER_NORM if self.is_layer_norm else TOKEN_NORM if self.is_token_norm else None

    @classmethod
    def uniform(cls, factor: float, d_in: int, d_out: int) -> Scaling:
        """Return the scaling that multiplies everything by one number."""
        return cls((SiteScale(d_in, factor),), (SiteScale(d_out, factor),))

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch as the SAE sees it, float32: what goes in, and what is reconstructed.

        Multiplied before it is narrowed, since float64 may be out of the range of float32.

        Args:
            x: [B, d_in], float.
            target: [B, d_out], float; x itself for an autoencoder, and what is returned then are the same, too.
        """
        if self.by_token:
            seen = normalized(self.by_token, x, torch.float32, [site.width for site in self.reads])
            return seen, seen
        if target is x:
            seen = _scaled(x, self.writes)
            return seen, seen
        return _scaled(x, self.reads), _scaled(target, self.writes)

    @property
    def units(self) -> Units:
        """What parameters are folded by."""
        d_in, d_out = (sum(site.width for site in sites) for sites in (self.reads, self.writes))
        return Units.of(_factors(self.reads), _factors(self.writes), d_in, d_out)

    def folded(self, sae: SAE) -> SAE:
        """Return the SAE for activations as they come, of one for activations as this gives them; shares what stays."""
        if self.by_token:
            return sae.normalizing(self.by_token)
        return sae.in_units(self.units)

    def unfolded(self, sae: SAE) -> SAE:
        """Return the SAE for activations as this gives them, of one for activations as they come: undoes `folded`."""
        if self.by_token:
            return sae.normalizing("none")
        return sae.in_units(self.units.inverse())


def _scaled(acts: Tensor, sites: tuple[SiteScale, ...]) -> Tensor:
    acts = acts.to(torch.promote_types(acts.dtype, torch.float32))
    if len({site.factor for site in sites}) == 1:
        factor = sites[0].factor
        return (acts if factor == 1.0 else acts * factor).float()
    return (acts * _factors(sites, acts.dtype, acts.device)).float()


@functools.cache  # a step that is captured must not copy from the host; the one before it has done so
def _factors(
    sites: tuple[SiteScale, ...],
    dtype: torch.dtype = torch.float64,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - frozen
) -> Tensor:
    """Return the factor of each coordinate: [d]."""
    factors = [torch.full((site.width,), site.factor, dtype=torch.float64, device="cpu") for site in sites]
    return torch.cat(factors).to(device, dtype)

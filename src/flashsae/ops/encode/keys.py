"""What latents are selected by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.ops.validate import packed
from flashsae.shapes import LatentActs


@dataclass(frozen=True)
class Keys:
    """What latents are selected by: their pre-activations, times a scale, or the magnitude of that.

    Args:
        b_enc: [d_sae], the bias of the pre-activations.
        scale: [d_sae]; None for 1 each.
        magnitude: whether the sign is left out.
    """

    b_enc: Tensor
    scale: Tensor | None = None
    magnitude: bool = False

    @classmethod
    def marked(cls, b_enc: Tensor, scale: Tensor | None, magnitude: bool) -> Keys:
        """Return keys with a bias of NaN where a latent's scale is none: without a wait for the device it shows."""
        return cls(b_enc if scale is None else torch.where(is_scale(scale), b_enc, torch.nan), scale, magnitude)

    def packed(self) -> Keys:
        """Return the same as kernels read it."""
        b_enc, scale = packed(self.b_enc, self.scale)
        return Keys(b_enc, scale, self.magnitude)

    def of(self, pre_acts: LatentActs) -> LatentActs:
        """Return the keys of pre-activations, of their dtype."""
        keys = pre_acts if self.scale is None else pre_acts * self.scale.to(pre_acts.dtype)
        return keys.abs() if self.magnitude else keys


def is_scale(key_scale: Tensor) -> Tensor:
    """Tell which numbers keep the order of what they multiply."""
    return (key_scale >= 0) & (key_scale < torch.inf)

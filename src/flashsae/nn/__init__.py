"""Modules and losses built from `flashsae.ops`."""

from flashsae.nn.losses import auxk_loss, fvu_loss
from flashsae.nn.sae import SAE, SAEConfig, SparseCode

__all__ = ["SAE", "SAEConfig", "SparseCode", "auxk_loss", "fvu_loss"]

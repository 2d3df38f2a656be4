"""Modules and losses built from `flashsae.ops`."""

from flashsae.nn.losses import fvu_weights, token_variance
from flashsae.nn.sae import SAE, SAEConfig, SparseCode

__all__ = ["SAE", "SAEConfig", "SparseCode", "fvu_weights", "token_variance"]

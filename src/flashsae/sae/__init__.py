"""Modules and losses built from `flashsae.ops`."""

from flashsae.ops.code import SparseCode
from flashsae.sae.losses import fvu_weights, token_variance
from flashsae.sae.module import SAE, SAEConfig

__all__ = ["SAE", "SAEConfig", "SparseCode", "fvu_weights", "token_variance"]

"""The SAE as a module, and the pieces that a training loop of one's own needs."""

from flashsae.sae.config import SAEConfig
from flashsae.sae.dead import DeadLatents, DeadRows, auxk_loss
from flashsae.sae.initial import initialize
from flashsae.sae.losses import fvu_weights, token_variance
from flashsae.sae.module import SAE
from flashsae.sae.saved import load_extras
from flashsae.sae.step import Step

__all__ = [
    "SAE",
    "DeadLatents",
    "DeadRows",
    "SAEConfig",
    "Step",
    "auxk_loss",
    "fvu_weights",
    "initialize",
    "load_extras",
    "token_variance",
]

"""The SAE as a module, and the pieces that a training loop of one's own needs."""

from flashsae.sae.centring import center, products, recentered, shift_b_enc
from flashsae.sae.config import SAEConfig
from flashsae.sae.dead import DeadLatents, DeadRows, auxk_loss
from flashsae.sae.initial import initialize
from flashsae.sae.losses import fvu_weights, token_variance
from flashsae.sae.module import SAE
from flashsae.sae.step import Step
from flashsae.sae.stored import load_extras
from flashsae.sae.straight_through import below_window, exceeds, jump_relu
from flashsae.sae.units import layer_norm

__all__ = [
    "SAE",
    "DeadLatents",
    "DeadRows",
    "SAEConfig",
    "Step",
    "auxk_loss",
    "below_window",
    "center",
    "exceeds",
    "fvu_weights",
    "initialize",
    "jump_relu",
    "layer_norm",
    "load_extras",
    "products",
    "recentered",
    "shift_b_enc",
    "token_variance",
]

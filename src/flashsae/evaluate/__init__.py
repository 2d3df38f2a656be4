"""Held-out figures and the geometry of latents."""

from flashsae.evaluate.heldout import Evaluation, evaluate, held_out_batches, latent_geometry

__all__ = ["Evaluation", "evaluate", "held_out_batches", "latent_geometry"]

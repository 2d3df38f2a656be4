"""Held-out figures and the geometry of latents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsae.evaluate.heldout import (
        Evaluation,
        evaluate,
        evaluate_together,
        held_out_batches,
        inference,
        latent_geometry,
    )

__all__ = ["Evaluation", "evaluate", "evaluate_together", "held_out_batches", "inference", "latent_geometry"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before: it takes torch, which importing flashsae alone does not
        return getattr(import_module("flashsae.evaluate.heldout"), name)
    raise AttributeError(f"module 'flashsae.evaluate' has no attribute {name!r}")

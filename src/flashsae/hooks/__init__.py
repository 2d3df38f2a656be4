"""SAEs in models that run: their codes are read, and what models go on with is changed by them."""

from flashsae.hooks.context import Codes, Hooked, hook
from flashsae.hooks.edits import Edit, ablate, clamp, scale, steer

__all__ = ["Codes", "Edit", "Hooked", "ablate", "clamp", "hook", "scale", "steer"]

"""The settings of a training, by the name that code of the loop calls them."""

from __future__ import annotations

from flashsae.settings.training import TrainConfig

__all__ = ["TrainConfig"]

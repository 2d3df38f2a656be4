"""Every setting there is, declared once: its type, range, default and explanation. Needs no torch."""

from flashsae.settings.reading import ActivationsConfig, ReadingConfig
from flashsae.settings.run import CONFIG_FILE, RunConfig
from flashsae.settings.training import TrainConfig

__all__ = ["CONFIG_FILE", "ActivationsConfig", "ReadingConfig", "RunConfig", "TrainConfig"]

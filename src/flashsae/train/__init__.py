"""Training: settings, the loop, dead latents, and `fit` for arrays."""

from flashsae.train.config import TrainConfig
from flashsae.train.fit import fit
from flashsae.train.loop import train
from flashsae.train.state import TrainState, init_state
from flashsae.train.step import train_step

__all__ = ["TrainConfig", "TrainState", "fit", "init_state", "train", "train_step"]

"""Training: settings, the loop, dead latents, and `fit` for arrays."""

from flashsae.train.config import TrainConfig
from flashsae.train.fit import fit
from flashsae.train.loop import train, train_step
from flashsae.train.state import TrainState, init_state

__all__ = ["TrainConfig", "TrainState", "fit", "init_state", "train", "train_step"]

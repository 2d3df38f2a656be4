"""Training: settings, the loop, dead latents, and `fit` for arrays."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsae.train.config import TrainConfig
    from flashsae.train.fit import fit
    from flashsae.train.fit_many import fit_many
    from flashsae.train.load import load_checkpoint
    from flashsae.train.loop import train
    from flashsae.train.state import TrainState, init_state
    from flashsae.train.step import train_step

__all__ = ["TrainConfig", "TrainState", "fit", "fit_many", "init_state", "load_checkpoint", "train", "train_step"]

_HOMES = {"TrainConfig": "config", "TrainState": "state", "init_state": "state", "load_checkpoint": "load"}
_HOMES |= {"train": "loop", "train_step": "step"}


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before: it takes torch, which importing flashsae alone does not
        value = getattr(import_module(f"flashsae.train.{_HOMES.get(name, name)}"), name)
        globals()[name] = value  # in place of a module of the same name
        return value
    raise AttributeError(f"module 'flashsae.train' has no attribute {name!r}")

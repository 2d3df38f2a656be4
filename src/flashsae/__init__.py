"""FlashSAE: exact, sparse-aware, memory-efficient training of sparse autoencoders.

What is here is imported when it is first asked for: torch takes seconds, and `flashsae --help` needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsae import data, errors, ops, sae
    from flashsae.architecture import Architecture, Parameter, Term, register
    from flashsae.data.from_model import activations
    from flashsae.evaluate.heldout import evaluate
    from flashsae.hooks import ablate, clamp, hook, scale, steer
    from flashsae.ops import SparseCode
    from flashsae.places.finding import load
    from flashsae.sae import SAE, SAEConfig
    from flashsae.sae_bench import saebench
    from flashsae.settings.training import TrainConfig
    from flashsae.train.fit import fit
    from flashsae.train.fit_many import fit_many
    from flashsae.train.from_model import train
    from flashsae.train.load import load_checkpoint

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Architecture",
    "Parameter",
    "SAEConfig",
    "SparseCode",
    "Term",
    "TrainConfig",
    "__version__",
    "ablate",
    "activations",
    "clamp",
    "data",
    "errors",
    "evaluate",
    "fit",
    "fit_many",
    "hook",
    "load",
    "load_checkpoint",
    "ops",
    "register",
    "sae",
    "saebench",
    "scale",
    "steer",
    "train",
]

_HOMES = {
    "Architecture": "architecture",
    "Parameter": "architecture",
    "Term": "architecture",
    "register": "architecture",
    "SAE": "sae",
    "SAEConfig": "sae",
    "SparseCode": "ops",
    "TrainConfig": "settings",
    "ablate": "hooks",
    "activations": "data.from_model",
    "clamp": "hooks",
    "evaluate": "evaluate",
    "fit": "train.fit",
    "fit_many": "train.fit_many",
    "hook": "hooks",
    "load": "places.finding",
    "load_checkpoint": "train.load",
    "saebench": "sae_bench",
    "scale": "hooks",
    "steer": "hooks",
    "train": "train.from_model",
}

for _package in ("evaluate", "train"):
    import_module(f"flashsae.{_package}")
    globals().pop(_package)  # the package is where imports find it; here, the name is that of the function in it


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"flashsae.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name.endswith("Settings"):
        for settings in _settings_of_architectures():
            if settings.__name__ == name:
                return settings
    if not name.startswith("_"):
        try:
            return import_module(f"flashsae.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"flashsae.{name}":
                raise  # the module is there; something it needs is not
    raise AttributeError(f"module 'flashsae' has no attribute {name!r}")


def _settings_of_architectures() -> list[type]:
    """Return the settings classes of our architectures: a new file among them has its settings here, too."""
    architecture = import_module("flashsae.architecture")
    names = architecture.architecture_names(installed=False)
    return [architecture.architecture_named(name).settings for name in names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(settings.__name__ for settings in _settings_of_architectures())})

"""FlashSAE: exact, sparse-aware, memory-efficient training of sparse autoencoders."""

from flashsae import data, errors, nn, ops
from flashsae.evaluate import evaluate
from flashsae.nn import SAE, SAEConfig, SparseCode
from flashsae.train import TrainConfig, fit

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "SAEConfig",
    "SparseCode",
    "TrainConfig",
    "__version__",
    "data",
    "errors",
    "evaluate",
    "fit",
    "nn",
    "ops",
]

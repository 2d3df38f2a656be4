"""Errors that FlashSAE raises on purpose. Each message names the thing, what was expected, what came, what to do."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class FlashSAEError(Exception):
    """Base of every error that FlashSAE raises on purpose; the command line prints it as one line."""


class ShapeError(FlashSAEError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(FlashSAEError, TypeError):
    """A tensor or an argument has the wrong dtype or type."""


class ConfigError(FlashSAEError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class GradientError(FlashSAEError, RuntimeError):
    """A derivative was asked for that the operations do not have."""


class DataError(FlashSAEError, ValueError):
    """Activations or text are empty, too small, not finite, or not what was asked for."""


class DataEndedError(DataError):
    """A source that can be read only once has ended before the training."""


class DivergedError(DataError):
    """The loss of a training is not finite any more, although its activations are."""

    saes: Sequence[Any] = ()
    """Of several SAEs those that were trained to their end, with None in the place of the others."""


class FlashSAEWarning(UserWarning):
    """A training goes on, but its result may not be what was meant."""


class CheckpointError(FlashSAEError):
    """A checkpoint, cache or saved SAE is damaged, foreign, or of another format version."""


class StorageError(FlashSAEError, OSError):
    """The file system refused: no space left, no permission, no such folder."""


class MissingExtraError(FlashSAEError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name, such as ``transformers``.
        extra: the extra of FlashSAE that installs it, such as ``hf``.
    Raises:
        MissingExtraError: names the module and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there; something it needs is broken, which is another story
        raise MissingExtraError(
            f"this needs the package '{module}', which is not installed: pip install 'flashsae[{extra}]'"
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error of somebody else's says first, as a sentence."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return (line if len(line) <= 300 else f"{line[:297]}...") + "."

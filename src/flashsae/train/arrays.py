"""What a training of arrays needs around it: its source, its folder, and who is warned."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
from torch import Tensor

from flashsae.backend import check_single_process, check_variables
from flashsae.data.acts import X
from flashsae.data.from_model import ModelActivations
from flashsae.data.shuffle import buffer_size
from flashsae.data.sources import ArraySource, IterableSource, RowSource, Source
from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning, StorageError
from flashsae.files.atomic import clear_leftovers, discard, only_one, storage_errors
from flashsae.logs.jsonl import LOG_FILE
from flashsae.settings.kinds import check, expand
from flashsae.train.config import TrainConfig

LEAST_TOKENS = 2_000_000
"""About 2000 steps: fewer leave some directions unfound, however small the data."""


def begun(run: str | Path | None, *, resume: bool, progress: bool) -> Path | None:
    """Return the folder of a training that is asked for; raise where it could not begin, whatever it trains on."""
    check_single_process()
    check_variables()
    for name, value in (("resume", resume), ("progress", progress)):
        check(name, value, bool)
    if resume and run is None:
        raise ConfigError("resume: expected run=FOLDER beside it, the folder to resume.")
    return None if run is None else expand(run, "run")


def source_of(x: Any, sites: Sequence[str]) -> Source:
    """Return the activations as a source.

    Args:
        x: as for `flashsae.fit`.
        sites: of an SAE, to take of each batch of an iterable; none where it takes all that there are.
    """
    if isinstance(x, ModelActivations):
        x = x.source
    if all(hasattr(x, name) for name in ("chunks", "widths", "name")):
        return x  # type: ignore[no-any-return]
    if isinstance(x, Tensor | np.ndarray | Mapping):
        return ArraySource(x)
    return IterableSource(x, sites=(X,) if len(sites) == 1 else sites)


def default_tokens(source: Source) -> int:
    """Return how many tokens to train on where nobody says it; ConfigError where the data have no known end."""
    if not isinstance(source, RowSource):
        raise ConfigError("tokens: expected a number, because the length of an iterable is not known. Give tokens=.")
    return max(10 * len(source.split_rows("train")), LEAST_TOKENS)


def buffered_tokens(source: Source, settings: TrainConfig) -> int:
    """Return how many tokens a shuffle buffer will hold; 0 where none is needed."""
    if isinstance(source, RowSource):
        return 0
    return buffer_size(settings.shuffle_tokens, settings.batch_tokens, settings.tokens)


def make_folder(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run, or find it to resume.

    Raises:
        StorageError, CheckpointError: it is there, or is not, against what was asked for; or cannot be made.
    """
    if resume and not folder.exists():
        raise CheckpointError(f"{folder} does not exist, so there is nothing to resume; leave out resume to start.")
    if folder.exists() and not resume:
        raise StorageError(f"{folder} exists already and is not overwritten; give resume=True or another folder.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def working_in(folder: Path | None, *, may_discard: bool) -> Iterator[None]:
    """Hold the lock of a run; one that fails before its first checkpoint leaves no folder in the way of the next."""
    if folder is None:
        yield
        return
    with only_one(folder):
        clear_leftovers(folder)
        try:
            yield
        except Exception:  # who stops it by hand may go on
            if may_discard:
                discard(folder, {LOG_FILE})
            raise


def warn_caller(message: str) -> None:
    """Warn in the name of whoever called `fit` or `fit_many`; between are frames of ours, and of contexts around it."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("flashsae", "contextlib"):
        frame, level = frame.f_back, level + 1
    warn(message, FlashSAEWarning, stacklevel=level)

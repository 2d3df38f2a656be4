"""Arrays first: train an SAE on activations that you have."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from flashsae.backend import resolve_device
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import ArraySource, IterableSource
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.files import only_one, storage_errors
from flashsae.nn.sae import SAE
from flashsae.train.callbacks import Callback, JsonlLog, ProgressBar
from flashsae.train.config import TrainConfig
from flashsae.train.loop import train
from flashsae.train.state import init_state

LEAST_TOKENS = 2_000_000
"""About 2000 steps: fewer leave some directions unfound, however small the data."""


def fit(
    x: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    *,
    d_sae: int,
    k: int,
    tokens: int | None = None,
    config: TrainConfig | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SAE:
    """Train a TopK SAE on activations.

    Args:
        x: [tokens, d_in], a float tensor, numpy array or memory-mapped array, read in random order; or any iterable
            of such batches, read in its order through a shuffle buffer. d_in is taken from it.
        d_sae: number of latents.
        k: latents active for each token.
        tokens: tokens to train on, repeats counted. Default: those of `config`; without one, ten
            times an array, at least 2 million.
        config: every other setting; its d_sae, k and tokens give way to those above.
        run: folder for metrics.jsonl and checkpoints. Must not exist, unless `resume`. None writes nothing.
        resume: go on from the newest checkpoint in `run`, bit for bit, with the same x and settings.
        progress: show a progress bar on standard error.
    Returns:
        the trained SAE, on the device it was trained on.
    Raises:
        ShapeError, DtypeError, ConfigError: an argument does not fit.
        DataError: x is empty, holds NaN or Inf, or ended early.
        StorageError, CheckpointError: `run` exists, or cannot be written or resumed.
    """
    if resume and run is None:
        raise ConfigError("resume: expected run=FOLDER beside it, the folder to go on in.")
    source = ArraySource(x) if isinstance(x, Tensor | np.ndarray) else IterableSource(x)
    if tokens is None and config is None:
        if not isinstance(source, ArraySource):
            raise ConfigError(
                "tokens: expected a number, because the length of an iterable is not known. Give tokens=."
            )
        tokens = max(10 * len(source.split_rows("train")), LEAST_TOKENS)
    base = config or TrainConfig()
    settings = replace(base, d_sae=d_sae, k=k, tokens=base.tokens if tokens is None else tokens).resolve(source.d_in)
    device = resolve_device(settings.device)
    batches = shuffled(source, settings.batch_tokens, seed=settings.seed, buffer_tokens=settings.shuffle_tokens)
    folder = None if run is None else Path(run)
    if folder is not None:
        if resume and not folder.exists():
            raise CheckpointError(f"{folder} does not exist, so there is nothing to resume; leave out resume to start.")
        if folder.exists() and not resume:
            raise StorageError(f"{folder} exists already and is not overwritten; give resume=True or another folder.")
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    checkpoints = None if folder is None else folder / "checkpoints"
    callbacks: list[Callback] = [] if folder is None else [JsonlLog(folder)]
    if progress:
        callbacks.append(ProgressBar(Console(stderr=True)))
    alone = nullcontext() if folder is None else only_one(folder)
    with alone, torch.inference_mode(False), torch.enable_grad():  # whatever the caller had switched off
        state = init_state(settings, batches, device, checkpoints)
        sae = train(state, settings, callbacks=callbacks, checkpoints=checkpoints)
        del state  # its memory may be needed for the whole weights
        return sae.to(device)

"""Arrays first: train an SAE on activations that you have."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from flashsae.architecture import architecture_of
from flashsae.backend import resolve_device
from flashsae.data.acts import Acts
from flashsae.data.shuffle import shuffled
from flashsae.errors import ConfigError
from flashsae.logs.callback import Callback, Warn
from flashsae.logs.jsonl import JsonlLog
from flashsae.logs.progress import ProgressBar, filling
from flashsae.neutral import neutral
from flashsae.sae.module import SAE
from flashsae.settings.keywords import settings_by_keyword, signature_with_settings
from flashsae.train.arrays import (
    begun,
    buffered_tokens,
    default_tokens,
    make_folder,
    source_of,
    warn_caller,
    working_in,
)
from flashsae.train.config import TrainConfig
from flashsae.train.init_from import settings_of_start
from flashsae.train.loop import train
from flashsae.train.plan import check_memory, make_plan
from flashsae.train.state import init_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashsae.settings.keywords import TrainSettings

    Arrays: TypeAlias = Tensor | np.ndarray | Acts


@overload
def fit(
    x: Arrays | Iterable[Arrays], *, config: TrainConfig | None = None, run: str | Path | None = None,
    resume: bool = False, progress: bool = True, **settings: Unpack[TrainSettings],
) -> SAE: ...  # fmt: skip


@overload
def fit(
    x: Arrays | Iterable[Arrays], *, arch: Any, config: TrainConfig | None = None, run: str | Path | None = None,
    resume: bool = False, progress: bool = True, **settings: Any,
) -> SAE: ...  # fmt: skip


@neutral()
def fit(
    x: Tensor | np.ndarray | Acts | Iterable[Tensor | np.ndarray | Acts],
    *,
    config: TrainConfig | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> SAE:
    """Train an SAE on activations: `fit(x, d_sae=16384, k=32, lr=4e-4, seed=1)`.

    What the caller has set for all of PyTorch (autocast, default dtype and device, gradient mode, ...) changes nothing.

    Args:
        x: [tokens, d_in], a float tensor, numpy array or memory-mapped array, read in random order; or any iterable
            of such batches (or of tuples and dicts of one, as a DataLoader gives), read in its order through a shuffle
            buffer. d_in is taken from it. If it can be read only once and ends early, the training ends with it. For an
            architecture of several sites: a dict of arrays of the same tokens by site, or an iterable of such. Where
            their names are not those of its sites, the order tells which is which. Also what `flashsae.activations`
            returns, or a source of `flashsae.data`.
        config: settings in one value; those given by name go before it. Beside the name of an architecture, what it
            sets of another one, such as k, is set of this one.
        run: folder for metrics.jsonl and checkpoints. Must not exist, unless `resume`; removed again by a training that
            fails before its first checkpoint. None writes nothing.
        resume: continue from the newest checkpoint in `run`, bit for bit, with the same x and settings.
        progress: say what will be done, and show a progress bar, on standard error.
        settings: every setting of `flashsae.TrainConfig` by its name: d_sae, arch, tokens, lr, seed ... None is the
            same as leaving one out. arch is a name of `flashsae.architecture.architecture_names()`, whose own settings
            stand beside it (arch=name, k=64), or a value of these settings, beside which none may stand. tokens counts
            repeats; where neither it nor `config` is given: ten times an array, at least 2 million. init_from may be an
            SAE too; without `config`, what is left open of d_sae and arch is as it is there.
    Returns:
        the trained SAE, in `eval()` mode, on the device it was trained on.
    Raises:
        ShapeError, DtypeError, ConfigError: an argument does not fit, there is no such setting, or this is one of
            several processes.
        DataError: x is empty, does not vary, holds NaN or Inf or what float32 cannot hold, or ended before the first
            step.
        StorageError, CheckpointError: `run` exists, or cannot be written or resumed.
    Warns:
        FlashSAEWarning: x ended early; its tokens come more than 100 times, as asked for; few of them hold
            most of the variance; no latent is active in the end.
    """
    folder = begun(run, resume=resume, progress=progress)
    asked, saved = _asked(settings, config)
    source = source_of(x, architecture_of(asked.arch).sites)
    is_open = settings.get("tokens") is None and config is None
    resolved = (replace(asked, tokens=default_tokens(source)) if is_open else asked).resolve(source.widths)
    device = resolve_device(resolved.device)
    buffered = buffered_tokens(source, resolved)
    row_bytes, model_bytes = (getattr(source, name, 0) for name in ("row_bytes", "model_bytes"))
    check_memory(make_plan(resolved, device, buffered * row_bytes, model_bytes), device)
    batches = shuffled(
        source,
        resolved.batch_tokens,
        seed=resolved.seed,
        buffer_tokens=resolved.shuffle_tokens,
        tokens=resolved.tokens,
    )
    if folder is not None:
        make_folder(folder, resume=resume)
    callbacks: list[Callback] = [Warn(warn_caller)] if folder is None else [Warn(warn_caller), JsonlLog(folder)]
    console = Console(stderr=True)
    if progress:
        told = _what_will_be_done(resolved, batches.epoch_tokens, buffered, device)
        console.print(told, highlight=False, soft_wrap=True)
        callbacks.append(ProgressBar(console))
    checkpoints = None if folder is None else folder / "checkpoints"
    with working_in(folder, may_discard=not resume):
        with filling(console) if progress else nullcontext() as on_fill:
            state = init_state(resolved, batches, device, checkpoints, on_fill, saved)
        sae = train(state, resolved, callbacks=callbacks, checkpoints=checkpoints, is_told_of_repeats=is_open)
        del state  # its memory may be needed for the whole weights
        return sae.to(device)


fit.__signature__ = signature_with_settings(fit)  # type: ignore[attr-defined]


def _asked(settings: dict[str, Any], config: TrainConfig | None) -> tuple[TrainConfig, SAE | None]:
    """Return the settings that are asked for, not filled in, and the SAE to go on from where one is given itself."""
    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(f"config: expected a flashsae.TrainConfig, got {type(config).__name__}.")
    start = settings.get("init_from")
    if start is not None and config is None:
        settings = settings_of_start(start, settings)
    saved = start if isinstance(start, SAE) else None
    if saved is not None:
        settings = {**settings, "init_from": None}
    return settings_by_keyword(settings, config, beside=("config", "run", "resume", "progress")), saved


def _what_will_be_done(config: TrainConfig, rows: int | None, buffered: int, device: torch.device) -> str:
    first = f" A shuffle buffer of {buffered:,} tokens is filled first." if buffered else ""
    often = f"each of the {rows:,} in x about {config.tokens / rows:,.3g} times" if rows else ""
    repeats = "" if rows is None else f" ({often if config.tokens >= rows else f'of the {rows:,} in x'})"
    return (
        f"{config.described}, {config.described_widths}, on {device}: {config.tokens:,} tokens{repeats} in "
        f"{config.steps:,} steps of {config.batch_tokens:,}.{first} tokens= changes how long it takes."
    )

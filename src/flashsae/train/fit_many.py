"""Several SAEs at once, on activations that you have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from flashsae.architecture import architecture_of
from flashsae.backend import resolve_device
from flashsae.data.acts import Acts, only_site
from flashsae.data.batches import OnFill
from flashsae.data.sources import Source
from flashsae.data.together import Together
from flashsae.errors import ConfigError, DivergedError, FlashSAEError
from flashsae.files.atomic import storage_errors
from flashsae.logs.callback import Callback, WarnOfOne
from flashsae.logs.jsonl import JsonlLog
from flashsae.logs.progress import ProgressBar, filling
from flashsae.neutral import neutral
from flashsae.sae.module import SAE
from flashsae.settings.keywords import settings_by_keyword, signature_with_settings
from flashsae.settings.kinds import check
from flashsae.settings.sweep import HOOKPOINT, SHARED, names_of
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
from flashsae.train.failure import failure_in, write_failure
from flashsae.train.following import Training
from flashsae.train.init_from import settings_of_start
from flashsae.train.loop import train_together
from flashsae.train.place import Place
from flashsae.train.plan import check_memory, make_plan, plan_together
from flashsae.train.state import init_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashsae.settings.keywords import TrainSettings

    Arrays: TypeAlias = Tensor | np.ndarray | Acts

CHECKPOINTS = "checkpoints"
_PACE = ("tokens", "batch_tokens", "shuffle_tokens", *SHARED)
"""Settings of which SAEs that train side by side have one value."""


@dataclass(frozen=True)
class _One:
    """One of the SAEs: what it is called, its settings, the sites that it reads, and what it goes on from."""

    name: str
    config: TrainConfig
    sites: tuple[str, ...]
    start: SAE | None


@overload
def fit_many(
    x: Arrays | Iterable[Arrays], settings: Iterable[Mapping[str, Any] | TrainConfig], *,
    config: TrainConfig | None = None, run: str | Path | None = None, resume: bool = False, progress: bool = True,
    **shared: Unpack[TrainSettings],
) -> list[SAE]: ...  # fmt: skip


@overload
def fit_many(
    x: Arrays | Iterable[Arrays], settings: Iterable[Mapping[str, Any] | TrainConfig], *, arch: Any,
    config: TrainConfig | None = None, run: str | Path | None = None, resume: bool = False, progress: bool = True,
    **shared: Any,
) -> list[SAE]: ...  # fmt: skip


@neutral()
def fit_many(
    x: Tensor | np.ndarray | Acts | Iterable[Tensor | np.ndarray | Acts],
    settings: Iterable[Mapping[str, Any] | TrainConfig],
    *,
    config: TrainConfig | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **shared: Any,
) -> list[SAE]:
    """Train several SAEs side by side: `fit_many(x, [{"k": 16}, {"k": 32}], d_sae=16384)`.

    Each batch is read once and moved to the device once, and each SAE does its step on it. Each is, bit for bit, what
    `fit` would have made of x with its settings.

    Args:
        x: as for `fit`: an array, read in random order, or an iterable of batches, read once. Of several sites, a dict
            of arrays of the same tokens by site, or an iterable of such.
        settings: of each SAE those in which it differs: by name, or a `TrainConfig`. Beside the names that `fit` takes,
            hookpoint names the site of x that an SAE reads, or several with commas between them. SAEs may differ in
            all but tokens, batch_tokens, shuffle_tokens, checkpoint_every_steps, device, d_in and d_out.
        config: settings of all in one value; those given by name go before it.
        run: folder for the runs of all SAEs: RUN/<what differs>/metrics.jsonl and checkpoints, and RUN/checkpoints with
            their place in x. As for `fit`.
        resume: continue from the newest step that all have in `run`, bit for bit, with the same x and settings.
        progress: as for `fit`.
        shared: settings of all by name; `settings` go before them.
    Returns:
        the trained SAEs, in the order of `settings`, in `eval()` mode, on the device they were trained on.
    Raises:
        ConfigError: there are no settings, two are the same, or they differ in what all share.
        DivergedError: the loss of some was not finite; the others were trained to their end and are in its `saes`, with
            None in the place of those that failed.
        Others as `fit`.
    Warns:
        FlashSAEWarning: as `fit`, each warning once.
    """
    folder = begun(run, resume=resume, progress=progress)
    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(f"config: expected a flashsae.TrainConfig, got {type(config).__name__}.")
    asked = _asked(settings, config, shared)
    source = source_of(x, _sites_of(asked))
    saes = _resolved(asked, source)
    device = resolve_device(saes[0].config.device)
    _check_memory(saes, source, device)
    if folder is not None:
        make_folder(folder, resume=resume)
    with working_in(folder, may_discard=not resume):
        return _trained(saes, source, device, folder, Console(stderr=True) if progress else None)


fit_many.__signature__ = signature_with_settings(fit_many)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Asked:
    """The settings of an SAE as they were given: not filled in; where it reads, if that is told; whether tokens are."""

    config: TrainConfig
    hookpoint: str | None
    start: SAE | None
    is_open: bool


def _asked(
    settings: Iterable[Mapping[str, Any] | TrainConfig], config: TrainConfig | None, shared: dict[str, Any]
) -> list[_Asked]:
    if isinstance(settings, Mapping | TrainConfig | str):
        raise ConfigError(f"settings: expected a list with settings for each SAE, got a {type(settings).__name__}.")
    found: list[_Asked] = []
    for number, each in enumerate(settings):
        if not isinstance(each, Mapping | TrainConfig):
            raise ConfigError(
                f"settings: expected a dict of settings or a TrainConfig for each SAE, got {type(each).__name__} as "
                f"number {number}."
            )
        base, given = (each, dict(shared)) if isinstance(each, TrainConfig) else (config, {**shared, **each})
        hookpoint = given.pop(HOOKPOINT, None)
        start = given.get("init_from")
        if start is not None and base is None:
            given = settings_of_start(start, given)
        saved = start if isinstance(start, SAE) else None
        if saved is not None:
            given = {**given, "init_from": None}
        one = settings_by_keyword(given, base, beside=("config", "run", "resume", "progress", HOOKPOINT))
        is_open = given.get("tokens") is None and base is None
        found.append(_Asked(one, None if hookpoint is None else check(HOOKPOINT, hookpoint, str), saved, is_open))
        if found[-1] in found[:-1]:
            first = found.index(found[-1])
            raise ConfigError(f"settings: expected SAEs that differ, got number {number} as number {first} is.")
    if not found:
        raise ConfigError("settings: expected settings of at least one SAE, got none.")
    for name in _PACE:
        values = {getattr(each.config, name) for each in found}
        if len(values) > 1:
            told = ", ".join(map(str, sorted(values, key=str)))
            raise ConfigError(f"{name}: expected one value, since the SAEs train side by side, got {told}.")
    return found


def _sites_of(asked: Sequence[_Asked]) -> Sequence[str]:
    """Return what to take of each batch of an iterable: the sites of an SAE where all have the same, else all."""
    sites = {architecture_of(each.config.arch).sites for each in asked}
    return () if len(sites) > 1 or any(each.hookpoint for each in asked) else sites.pop()


def _resolved(asked: Sequence[_Asked], source: Source) -> list[_One]:
    """Return the SAEs with all settings worked out."""
    tokens = default_tokens(source) if all(each.is_open for each in asked) else None
    names = names_of([(each.hookpoint or "x", each.config) for each in asked]) if len(asked) > 1 else ["sae"]
    found = []
    for name, each in zip(names, asked):
        sites = _read_by(each, source)
        config = each.config if tokens is None else replace(each.config, tokens=tokens)
        found.append(_One(name, config.resolve({site: source.widths[site] for site in sites}), sites, each.start))
    return found


def _read_by(asked: _Asked, source: Source) -> tuple[str, ...]:
    there = list(source.widths)
    if asked.hookpoint is not None:
        named = tuple(part.strip() for part in asked.hookpoint.split(","))
        missing = [name for name in named if name not in there]
        if missing:
            raise ConfigError(f"hookpoint: expected sites of x, {', '.join(there)}, got {missing[0]!r}.")
        return named
    if len(architecture_of(asked.config.arch).sites) == 1:
        only_site(source.widths)
    return tuple(there)


def _check_memory(saes: Sequence[_One], source: Source, device: torch.device) -> None:
    seeds = len({one.config.seed for one in saes})
    row_bytes, model_bytes = (getattr(source, name, 0) for name in ("row_bytes", "model_bytes"))
    buffer_bytes = seeds * buffered_tokens(source, saes[0].config) * row_bytes
    plans = [make_plan(one.config, device) for one in saes]
    check_memory(plan_together(plans, device, buffer_bytes, model_bytes), device)


def _trained(
    saes: Sequence[_One],
    source: Source,
    device: torch.device,
    folder: Path | None,
    console: Console | None,
) -> list[SAE]:
    """Train the SAEs, with their runs in a folder where there is one."""
    first = saes[0].config
    batches = Together(
        source,
        first.batch_tokens,
        seeds=[one.config.seed for one in saes],
        buffer_tokens=first.shuffle_tokens,
        tokens=first.tokens,
    )
    where = [None if folder is None else folder / one.name for one in saes]
    failures = {one.name: why for one, each in zip(saes, where) if each and (why := failure_in(each)) is not None}
    place = _place(batches, {one.name: each for one, each in zip(saes, where) if each is not None}, failures)
    if console is not None:
        console.print(_what_will_be_done(saes, device), highlight=False, soft_wrap=True)
    running, told = [one for one in saes if one.name not in failures], set[str]()
    with filling(console) if console is not None else nullcontext() as on_fill:
        trainings = [_training(one, batches, device, folder, on_fill, told) for one in running]

    def on_failure(number: int, error: FlashSAEError) -> None:
        failures[running[number].name] = str(error)
        if folder is not None:
            write_failure(folder / running[number].name, str(error))

    bar = [] if console is None else [ProgressBar(console)]
    results = train_together(trainings, batches, callbacks=bar, place=place, on_failure=on_failure)
    trainings.clear()  # their memory may be needed for the whole weights
    found = {one.name: result.to(device) for one, result in zip(running, results) if isinstance(result, SAE)}
    if failures:
        why = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        error = DivergedError(f"{len(failures)} of {len(saes)} SAEs failed, and `saes` of this has the others: {why}")
        error.saes = [found.get(one.name) for one in saes]
        raise error
    return [found[one.name] for one in saes]


def _training(
    one: _One, batches: Together, device: torch.device, folder: Path | None, on_fill: OnFill | None, told: set[str]
) -> Training:
    """Return the training of an SAE, gone on to its newest checkpoint."""
    own = None if folder is None else folder / one.name
    checkpoints = None if own is None else own / CHECKPOINTS
    view = batches.view(one.config.seed, one.sites)
    state = init_state(one.config, view, device, checkpoints, on_fill, one.start)
    log: list[Callback] = [] if own is None else [JsonlLog(own)]
    return Training(
        state, one.config, [WarnOfOne(warn_caller, one.name, told), *log], checkpoints, is_told_of_repeats=True
    )


def _place(batches: Together, folders: Mapping[str, Path], failed: Collection[str]) -> Place | None:
    """Return what saves the place in the data of SAEs that have folders, gone on to the newest step of all."""
    if not folders:
        return None
    run = next(iter(folders.values())).parent
    place = Place(run / CHECKPOINTS, batches, {name: each / CHECKPOINTS for name, each in folders.items()}, failed)
    place.resume()
    for folder in folders.values():  # not before it is known that they are those of the run
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
    return place


def _what_will_be_done(saes: Sequence[_One], device: torch.device) -> str:
    config = saes[0].config
    named = "; ".join(f"{one.name}: {one.config.described}" for one in saes[:8])
    more = f"; and {len(saes) - 8} more" if len(saes) > 8 else ""
    return (
        f"{len(saes)} SAEs on {device} ({named}{more}): {config.tokens:,} tokens in {config.steps:,} steps of "
        f"{config.batch_tokens:,}. tokens= changes how long it takes."
    )

"""What is settled before a run begins: that its settings can work here, where it goes, and what it will need."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from flashsae.backend import check_single_process, check_variables, resolve_device
from flashsae.data.open import prepare_activations, run_name
from flashsae.data.prepared import Prepared, with_hookpoint
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import RowSource, Source
from flashsae.errors import ConfigError, DataError, FlashSAEError, StorageError, require
from flashsae.files import atomic
from flashsae.lm.place import model_place
from flashsae.logs.jsonl import LOG_FILE
from flashsae.logs.trackers import check_logger
from flashsae.report.evaluation_file import read_evaluation
from flashsae.run.exporting import check_names
from flashsae.run.parts import CHECKPOINTS, asked_of, most_tokens, part_folders, planned_saes
from flashsae.settings.reading import MINILM
from flashsae.settings.run import CONFIG_FILE, RunConfig
from flashsae.train.checkpoint import list_checkpoints, step_of
from flashsae.train.failure import failure_in

RUNS = Path("runs")
"""Where runs go that are given no folder."""


def saved_config(run: Path) -> RunConfig:
    """Return the settings of the run in a folder.

    Raises:
        CheckpointError: there is none.
    """
    return RunConfig.from_toml(run / CONFIG_FILE)


def check(config: RunConfig) -> None:
    """Raise what a run would, as far as it can be told before anything is read.

    Raises:
        ConfigError: no such device, logger, format or backend, or this is one of several processes.
        MissingExtraError: a package is missing that the run needs, be it at its end.
    """
    check_single_process()
    check_variables()
    resolve_device(config.train.device)
    if config.activations.activations is None:
        model_place(config.activations.model or MINILM)  # raises where minilm is not installed
    if config.report:
        for package in ("jinja2", "matplotlib"):
            require(package, "report")  # now, not after hours of training
    for name in config.logger:
        check_logger(name)
    check_names(config.export)


def place_of(config: RunConfig, run: Path | None = None) -> Path:
    """Return the folder that a new run gets, and make nothing.

    Args:
        config: the settings.
        run: the folder that was asked for. None: a new one under runs/, named after model and hookpoint.
    Raises:
        StorageError: the folder exists already, or cannot be made there.
    """
    if run is None:
        name = _name(config)
        names = (name + suffix for suffix in chain([""], (f"-{n}" for n in count(2))))
        run = next(path for path in map(RUNS.joinpath, names) if not path.exists())
    with atomic.storage_errors(run):
        try:
            is_folder = run.is_dir() if run.lstat() else False
        except (FileNotFoundError, NotADirectoryError):
            _check_parent(run)
            return run
    if is_folder:
        raise StorageError(
            f"{run} exists already and is not overwritten. Go on with it: flashsae train --resume {run}, or give "
            "another folder."
        )
    raise StorageError(f"{run} is a file, and a run is a folder. Give another name.")


def _name(config: RunConfig) -> str:
    """Return what a run is called after: its model, and where it reads."""
    asked = asked_of(config)
    hookpoints = [each.hookpoint for each in asked]
    named = ", ".join(dict.fromkeys(name for name in hookpoints if name)) or None
    return run_name(with_hookpoint(config.activations, named), len(asked[0].sites)) + (
        f"-{len(asked)}-saes" if len(asked) > 1 else ""
    )


def _check_parent(run: Path) -> None:
    parent = next(path for path in run.absolute().parents if path.exists())
    if not parent.is_dir():
        raise StorageError(f"{run} cannot be made: {parent} is a file. Give another folder.")
    if not os.access(parent, os.W_OK):
        raise StorageError(f"{run} cannot be made: {parent} may not be written to. Give another folder.")


def new_run(config: RunConfig, run: Path | None = None) -> Path:
    """Make the folder of a run with its settings in it; a kill leaves no folder or a whole one.

    Args:
        config: the settings.
        run: folder, must not exist. None: a new one under runs/, named after model and hookpoint.
    Raises:
        StorageError: the folder exists or cannot be made.
    """
    place = place_of(config, run)
    try:
        with atomic.atomic_directory(place) as folder:
            (folder / CONFIG_FILE).write_text(config.to_toml(), "utf-8")
    except StorageError:
        if run is not None or not place.exists():
            raise
        return new_run(config)  # another process took the name meanwhile
    return place


def check_whole(run: Path) -> None:
    """Raise ConfigError where a folder is that of one SAE of several, which go on together."""
    parent = run.absolute().parent
    if (parent / CONFIG_FILE).exists() and any((parent / CHECKPOINTS).glob("**/step-*")):
        raise ConfigError(
            f"resume: {run} is one of the SAEs of {parent}, which go on together. Name that folder: flashsae train "
            f"--resume {parent}."
        )


def extended(config: RunConfig, run: Path, tokens: int) -> RunConfig:
    """Return the settings of a run that has ended as those of one that goes on.

    Args:
        config: its settings.
        run: its folder.
        tokens: to train on beside those of the run.
    Raises:
        ConfigError: it has not ended.
    """
    for folder in part_folders(run) or [run]:
        left = None if failure_in(folder) is not None else _left_to_do(folder, len(config.train.extended))
        if left is not None:
            raise ConfigError(
                f"extend: expected a run that has ended, and {folder} {left}. Finish it first: flashsae train --resume "
                f"{run}."
            )
    train = config.train
    least = train.steps * train.batch_tokens - train.tokens + 1  # the last batch of the run may not have been whole
    if tokens < least:
        raise ConfigError(f"extend: expected at least {least} tokens, which make another step, got {tokens}.")
    more = replace(train, tokens=train.tokens + tokens, extended=(*train.extended, train.tokens))
    saes = tuple(
        {**each, "tokens": each["tokens"] + tokens, "extended": [*each.get("extended", ()), each["tokens"]]}
        if "tokens" in each
        else each
        for each in config.sae
    )
    return replace(config, train=more, sae=saes)


def has_ended(config: RunConfig, run: Path) -> bool:
    """Tell whether all SAEs of a run are trained and measured; no where something of it is damaged."""
    with suppress(FlashSAEError):
        folders = part_folders(run) or [run]
        times = len(config.train.extended)
        return all(failure_in(each) is None and _left_to_do(each, times) is None for each in folders)
    return False


def _left_to_do(folder: Path, times: int) -> str | None:
    """Say what an SAE of a run that was extended so many times lacks, so that it is not extended twice by mistake."""
    train, found = saved_config(folder).train, list_checkpoints(folder / CHECKPOINTS)
    done = step_of(found[-1]) if found else 0
    if len(train.extended) < times:
        return "has not begun with what it was extended by"
    if done != train.steps:
        return f"has done {done:,} of {train.steps:,} steps"
    path = folder / "evaluation.json"
    is_measured = path.exists() and read_evaluation(path)["steps"] == train.steps
    return None if is_measured else f"has done its {train.steps:,} steps and was not measured behind them"


def write_extended(config: RunConfig, run: Path) -> None:
    """Write the settings of a run that goes on.

    Raises:
        StorageError: the file system refused, or another process works on the run.
    """
    with atomic.only_one(run):
        atomic.write_atomic(run / CONFIG_FILE, config.to_toml())


def discard_if_empty(run: Path) -> bool:
    """Remove a run that failed before anything but its settings was written; return whether it was so."""
    if not atomic.discard(run, {CONFIG_FILE}):
        return False
    if run.parent == RUNS and not any(RUNS.iterdir()):
        RUNS.rmdir()
    return True


def prepare(config: RunConfig, run: Path) -> Prepared:
    """Find the activations of a run, or what has to be done to get them: see `prepare_activations`."""
    has_parts = any(run.glob(f"*/{CONFIG_FILE}"))
    return prepare_activations(
        config.activations,
        tokens=most_tokens(config),
        folder=run.parent / "activations",
        device=str(resolve_device(config.train.device)),
        is_checked=(run / LOG_FILE).exists() or has_parts,
        asked=asked_of(config),
    )


def check_rows(config: RunConfig, prepared: Prepared) -> None:
    """Raise what training would, once it begins, over activations that are ready.

    Raises:
        ConfigError, DataError: too few rows for a batch, or none held out.
    """
    if prepared.ready is None:
        return
    for one in planned_saes(config, prepared):
        source = prepared.ready.sources[one.reads]
        shuffled(source, one.train.batch_tokens, seed=0, buffer_tokens=one.train.shuffle_tokens)
        if isinstance(source, RowSource) and not len(source.split_rows("held_out")):
            raise nothing_held_out(source, config)


def nothing_held_out(source: Source, config: RunConfig) -> DataError:
    """Return the error of a source that no document of which fell to the held-out part."""
    return DataError(
        f"{source.name} is too small: no document fell to the held-out part, {config.activations.held_out:.3g} of "
        "all. Give more text or a larger held_out."
    )

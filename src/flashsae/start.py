"""What is settled before a run begins: that its settings can work here, where it goes, and what it will need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from flashsae import files
from flashsae.architecture import architecture_of
from flashsae.backend import check_single_process, check_variables, resolve_device
from flashsae.data.open import Prepared, prepare_activations, run_name
from flashsae.data.shuffle import buffer_size, shuffled
from flashsae.data.sources import RowSource, Source
from flashsae.errors import DataError, StorageError, require
from flashsae.lm.place import model_place
from flashsae.logs.jsonl import LOG_FILE
from flashsae.logs.trackers import check_logger
from flashsae.metrics import METRICS
from flashsae.settings.reading import MINILM
from flashsae.settings.run import CONFIG_FILE, RunConfig
from flashsae.train.plan import check_memory, make_plan, repeats_warning

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
        ConfigError: no such device, logger or backend, or this is one of several processes.
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


def place_of(config: RunConfig, run: Path | None = None) -> Path:
    """Return the folder that a new run gets, and make nothing.

    Args:
        config: the settings.
        run: the folder that was asked for. None: a new one under runs/, named after model and hookpoint.
    Raises:
        StorageError: the folder exists already, or cannot be made there.
    """
    if run is None:
        name = run_name(config.activations, len(architecture_of(config.train.arch).sites))
        names = (name + suffix for suffix in chain([""], (f"-{n}" for n in count(2))))
        run = next(path for path in map(RUNS.joinpath, names) if not path.exists())
    with files.storage_errors(run):
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
    run = place_of(config, run)
    with files.atomic_directory(run) as folder:
        (folder / CONFIG_FILE).write_text(config.to_toml(), "utf-8")
    return run


def discard_if_empty(run: Path) -> bool:
    """Remove a run that failed before anything but its settings was written; return whether it was so."""
    if not files.discard(run, {CONFIG_FILE}):
        return False
    if run.parent == RUNS and not any(RUNS.iterdir()):
        RUNS.rmdir()
    return True


def prepare(config: RunConfig, run: Path) -> Prepared:
    """Find the activations of a run, or what has to be done to get them: see `prepare_activations`."""
    has_parts = any(run.glob(f"*/{CONFIG_FILE}"))
    return prepare_activations(
        config.activations,
        tokens=config.train.tokens,
        folder=run.parent / "activations",
        device=str(resolve_device(config.train.device)),
        is_checked=(run / LOG_FILE).exists() or has_parts,
        sites=architecture_of(config.train.arch).sites,
    )


def plan_table(config: RunConfig, prepared: Prepared, run: Path) -> Table:
    """Return what a run will do and need.

    Args:
        config: the settings.
        prepared: its activations.
        run: its folder, which need not exist.
    Raises:
        ConfigError: k > d_sae, or the training cannot fit into the memory of the device.
    """
    device = resolve_device(config.train.device)
    resolved = [config.train.resolve(widths) for widths in prepared.widths.values()]
    settings = max(resolved, key=lambda each: each.d_sae * (each.d_in + each.d_out))
    buffered = buffer_size(settings.shuffle_tokens, settings.batch_tokens, settings.tokens)
    plan = make_plan(settings, device, prepared.row_bytes * buffered, prepared.model_bytes)
    warning = check_memory(plan, device)
    n = len(prepared.widths)
    rows = {
        "model": f"{prepared.config.model} at {_places(prepared)}, {settings.described_widths}",
        "text": prepared.source,
        "inputs": prepared.inputs(),
        "SAE": (f"{n} SAEs, one after another, each: " if n > 1 else "")
        + f"{settings.described}: {plan.parameters:,} parameters",
        **({} if settings.init_from is None else {"start": f"from the SAE in {settings.init_from}"}),
        "training": f"{settings.tokens:,} tokens in {plan.steps:,} steps of {settings.batch_tokens:,}, "
        f"learning rate {settings.lr:.2g}{_repeats(settings.tokens, prepared)}",
        METRICS["dead_latents"].label: f"after {settings.dead_after_tokens:,} tokens in which they are not active; "
        + (f"auxiliary loss with weight {settings.auxk_alpha:.3g}" if settings.auxk_alpha else "no auxiliary loss"),
        "peak memory": f"about {plan.peak_bytes / 1e9:.2f} GB on {device}: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.parts.items())
        + warning,
        "run folder": str(run),
    }
    if prepared.row_bytes:
        rows["shuffle buffer"] = f"{buffered:,} tokens, which the model reads before the first step"
    if prepared.cache_bytes:
        rows["disk"] = f"{prepared.cache_bytes / 1e9:.2f} GB at most for the cache" + _disk_warning(prepared, run)
    return table("Plan", rows)


def _places(prepared: Prepared) -> str:
    """Name the hookpoints of every SAE; those of one together, where it has several."""
    is_several = len(prepared.widths) > 1
    return ", ".join(f"({name})" if is_several and len(of) > 1 else name for name, of in prepared.widths.items())


def check_rows(config: RunConfig, prepared: Prepared) -> None:
    """Raise what training would, once it begins, over activations that are ready.

    Raises:
        ConfigError, DataError: too few rows for a batch, or none held out.
    """
    if prepared.ready is None:
        return
    for source in prepared.ready.sources.values():
        shuffled(source, config.train.batch_tokens, seed=0, buffer_tokens=config.train.shuffle_tokens)
        if isinstance(source, RowSource) and not len(source.split_rows("held_out")):
            raise nothing_held_out(source, config)


def nothing_held_out(source: Source, config: RunConfig) -> DataError:
    """Return the error of a source that no document of which fell to the held-out part."""
    return DataError(
        f"{source.name} is too small: no document fell to the held-out part, {config.activations.held_out:.3g} of "
        "all. Give more text or a larger held_out."
    )


def _repeats(tokens: int, prepared: Prepared) -> str:
    """Say how often each token comes, if that is known already; with a warning if it is too often."""
    source = None if prepared.ready is None else next(iter(prepared.ready.sources.values()))
    rows = len(source.split_rows("train")) if isinstance(source, RowSource) else 0
    if tokens <= rows or not rows:
        return ""
    warning = repeats_warning(tokens, rows)
    return f"; each token about {tokens / rows:,.3g} times" + (f". Warning: {warning}" if warning else "")


def _disk_warning(prepared: Prepared, run: Path) -> str:
    """Return a warning if a cache that is yet to be written may not fit, else ""."""
    if prepared.ready is not None:
        return ", there already"
    place = (prepared.config.activations or run).absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    return f"; may not fit, since {free / 1e9:.2f} GB are free" if prepared.cache_bytes > free else ""


def table(title: str, rows: Mapping[str, str]) -> Table:
    """Return a table of names and what there is to say of them."""
    made = Table(title=escape(title), title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(escape(name), escape(value))
    return made

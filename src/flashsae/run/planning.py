"""The plan of a run: what it will do and need, as a table."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from flashsae.backend import resolve_device
from flashsae.data.prepared import Prepared
from flashsae.data.shuffle import buffer_size
from flashsae.data.sources import RowSource
from flashsae.errors import ConfigError
from flashsae.metrics import METRICS
from flashsae.run.parts import Planned, planned_saes, rounds_of
from flashsae.settings.run import RunConfig
from flashsae.train.config import TrainConfig
from flashsae.train.plan import Plan, at_once, check_memory, make_plan, plan_together, repeats_warning

_MOST_SHOWN = 16


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
    planned = planned_saes(config, prepared)
    rounds = rounds_of(planned, config.at_once, is_streamed=prepared.is_streamed)
    settings = max((one.train for one in planned), key=lambda each: each.d_sae * (each.d_in + each.d_out))
    buffered = buffer_size(settings.shuffle_tokens, settings.batch_tokens, settings.tokens)
    plan = max((_plan_of(each, prepared, buffered, device) for each in rounds), key=lambda plan: plan.peak_bytes)
    widths = dict.fromkeys(one.train.described_widths for one in planned)
    rows = {
        "model": f"{prepared.config.model} at {_places(prepared)}, {', '.join(widths)}",
        "images" if prepared.of_images else "text": prepared.source,
        "inputs": prepared.inputs(),
        **_saes(planned, rounds, plan),
        **({} if settings.init_from is None else {"start": f"from the SAE in {settings.init_from}"}),
        "training": _training(planned, prepared),
        METRICS["dead_latents"].label: f"after {settings.dead_after_tokens:,} tokens in which they are not active; "
        + (f"auxiliary loss with weight {settings.auxk_alpha:.3g}" if settings.auxk_alpha else "no auxiliary loss"),
        "peak memory": f"about {plan.peak_bytes / 1e9:.2f} GB on {device}: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.parts.items())
        + _memory_warning(plan, rounds, device, is_streamed=prepared.is_streamed),
        "run folder": str(run),
    }
    if prepared.row_bytes:
        seeds = len({one.train.seed for one in planned})
        of_each = f" for each of {seeds} seeds" if seeds > 1 else ""
        rows["shuffle buffer"] = f"{buffered:,} tokens{of_each}, which the model reads before the first step"
    if prepared.cache_bytes:
        rows["disk"] = f"{prepared.cache_bytes / 1e9:.2f} GB at most for the cache" + _disk_warning(prepared, run)
    return table("Plan", {name: _of_patches(told) for name, told in rows.items()} if prepared.of_images else rows)


def _of_patches(told: str) -> str:
    """Return what is told of tokens as told of patches; names of settings stay."""
    return re.sub(r"(?<![-\w])tokens(?![-\w])", "patches", told)


def _plan_of(planned: Sequence[Planned], prepared: Prepared, buffered: int, device: torch.device) -> Plan:
    """Return the size of the training of some SAEs side by side."""
    seeds = len({one.train.seed for one in planned})
    buffer_bytes, model_bytes = seeds * prepared.row_bytes * buffered, prepared.model_bytes
    if len(planned) == 1:
        return make_plan(planned[0].train, device, buffer_bytes, model_bytes)
    return plan_together([make_plan(one.train, device) for one in planned], device, buffer_bytes, model_bytes)


def _saes(planned: Sequence[Planned], rounds: Sequence[Sequence[Planned]], plan: Plan) -> dict[str, str]:
    """Describe the SAEs of a run."""
    if len(planned) == 1:
        return {"SAE": f"{planned[0].train.described}: {plan.parameters:,} parameters"}
    named = [f"{one.name}: {one.train.described}" for one in planned]
    shown = (
        named if len(named) <= _MOST_SHOWN else [*named[: _MOST_SHOWN - 1], f"and {len(named) - _MOST_SHOWN + 1} more"]
    )
    how = "side by side" if len(rounds) == 1 else f"in {len(rounds)} rounds, one after another"
    return {f"{len(planned)} SAEs": "\n".join([f"{how}, each in a folder of its own", *shown])}


def _training(planned: Sequence[Planned], prepared: Prepared) -> str:
    """Say how long the SAEs are trained, and at which rate."""
    found: dict[str, None] = {}
    for one in planned:
        of = one.train
        found[f"{of.tokens:,} tokens in {of.steps:,} steps of {of.batch_tokens:,}, learning rate {of.lr:.2g}"] = None
    shown = list(found)
    sizes = {
        f"{one.train.tokens:,} tokens in {one.train.steps:,} steps of {one.train.batch_tokens:,}" for one in planned
    }
    if len(shown) > 1 and len(sizes) == 1:
        rates = sorted(one.train.lr for one in planned)
        shown = [f"{sizes.pop()}, learning rates {rates[0]:.2g} to {rates[-1]:.2g}"]
    return (
        "; ".join(shown) + _extension(planned[0].train) + _repeats(max(one.train.tokens for one in planned), prepared)
    )


def _extension(train: TrainConfig) -> str:
    """Say how the learning rate goes on where a training is extended."""
    if not train.extended:
        return ""
    begin, end = train.stage(train.steps - 1)
    fall = round(train.decay_fraction * (end - begin))
    how = "stays" if not train.decay_fraction else (
        f"rises again over {min(train.warmup_steps, end - begin):,} steps and falls to 0 in the last {fall:,}"
    )  # fmt: skip
    return f"; extended behind step {begin:,}, where the learning rate {how}"


def _memory_warning(plan: Plan, rounds: Sequence[Sequence[Planned]], device: torch.device, *, is_streamed: bool) -> str:
    """Return a warning where the SAEs of a round may not fit beside each other, with how many do; else "".

    Raises:
        ConfigError: they cannot fit.
    """
    longest = max(rounds, key=len)
    fit = at_once([make_plan(one.train, device) for one in longest], device)
    if fit is None or len(longest) == 1:
        return check_memory(plan, device)
    how = "with a cache (--activations FOLDER) " if is_streamed else ""
    told = f"{fit} of {len(longest)} SAEs fit side by side: {how}--at-once {fit} trains them in rounds"
    try:
        return f"{check_memory(plan, device)}. {told}"
    except ConfigError as error:
        raise ConfigError(f"at_once: {str(error).partition(': ')[2].partition(' Take')[0]} {told}.") from error


def _places(prepared: Prepared) -> str:
    """Name the hookpoints of every SAE; those of one together, where it has several."""
    is_several = len(prepared.widths) > 1
    return ", ".join(f"({name})" if is_several and len(of) > 1 else name for name, of in prepared.widths.items())


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

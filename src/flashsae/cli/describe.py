"""What is in a cache of activations, in tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flashsae.data.acts_shape import OUTLIER_DIMENSION_RATIO, Shape
from flashsae.data.cache_summary import CacheSummary, SiteSummary
from flashsae.files.atomic import write_atomic
from flashsae.metrics import OUTLIER_NORM_RATIO
from flashsae.metrics.numbers import count, percent, real
from flashsae.run.planning import table
from flashsae.settings.kinds import expand

_SINK = 5.0
"""A position whose median norm is so many times that of all is pointed out."""
_SHOWN_SETTINGS = (
    *("context_length", "mask_special", "skip_first", "exclude_ids", "prepend_bos", "max_norm_ratio"),
    *("model_dtype", "max_tokens", "document_seed"),
)


def described(summary: CacheSummary) -> Iterator[Table]:
    """Yield the tables that tell what is in a cache."""
    yield table(summary.directory, _overview(summary))
    for site in summary.sites:
        yield table(f"{site.hookpoint}, {site.width} dimensions", _site(site))
        if site.shape is not None:
            yield _positions(site.shape)


def write_described(summary: CacheSummary, path: Path) -> None:
    """Write a summary as JSON; numbers that are not finite become null.

    Raises:
        StorageError: the file system refused.
    """
    write_atomic(expand(path, "json"), json.dumps(_finite(asdict(summary)), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return real(value) if isinstance(value, float) else value


def _overview(summary: CacheSummary) -> dict[str, str]:
    documents = "" if summary.documents is None else f" of {count(summary.documents)} documents"
    rows = f"{count(summary.rows)} tokens{documents}"
    if not summary.is_complete:
        rows += " so far: it is not complete; the command that began it goes on"
    stored = summary.dtype + ("" if summary.compression == "none" else f", compressed ({summary.compression})")
    settings = {name: summary.settings.get(name) for name in _SHOWN_SETTINGS}
    return {
        "rows": rows,
        "model": summary.model,
        "text": "\n".join(summary.texts),
        "stored as": f"{stored}, {_size(summary.size)} in {count(summary.shards)} shards",
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [])),
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _site(site: SiteSummary) -> dict[str, str]:
    shape = site.shape
    rows = {"sample": f"{count(site.sample_rows)} rows; {_size(site.size)} on disk"}
    if site.not_finite_rows:
        rows["NaN or Inf"] = f"in {count(site.not_finite_rows)} of these rows, which training refuses"
    if shape is None:
        return rows
    variance = f"mean of ‖x − mean‖² {shape.variance:.4g}"
    if shape.effective_dimensions is not None:
        variance += f", in {shape.effective_dimensions:.0f} effective dimensions"
    if shape.constant_dimensions:
        variance += f"; {count(shape.constant_dimensions)} dimensions are constant"
    return rows | {
        "norm": f"median {shape.norm:.4g}, mean {shape.mean_norm:.4g}, largest {shape.largest_norm:.4g}",
        "mean": f"{percent(shape.mean_share)} of the mean of ‖x‖²",
        "spread": variance,
        "outlier tokens": _outlier_tokens(site, shape),
        "outlier dimensions": _outlier_dimensions(shape),
        "rounds away": ", ".join(f"{name} {share:.1e}" for name, share in site.rounds_away.items())
        + " of the variance, below which no FVU can be",
    }


def _outlier_tokens(site: SiteSummary, shape: Shape) -> str:
    found = shape.outlier_tokens
    if not found.rows:
        return f"none above {OUTLIER_NORM_RATIO:g} times the median norm"
    words = ", ".join(
        f"{token} {repr(site.words[token]) + ' ' if token in site.words else ''}({count(n)})"
        for token, n in found.commonest
    )
    return (
        f"{count(found.rows)} ({percent(found.rows / site.sample_rows)}) above {OUTLIER_NORM_RATIO:g} times the median "
        f"norm, with {percent(found.share)} of the variance; commonest: {words}"
    )


def _outlier_dimensions(shape: Shape) -> str:
    if not shape.n_outlier_dimensions:
        return f"none above {OUTLIER_DIMENSION_RATIO:g} times the median"
    words = ", ".join(
        f"{each.dimension} ({each.ratio:.3g} times, {percent(each.share)} of ‖x‖²)" for each in shape.outlier_dimensions
    )
    return f"{count(shape.n_outlier_dimensions)} above {OUTLIER_DIMENSION_RATIO:g} times the median: {words}"


def _positions(shape: Shape) -> Table:
    made = Table(box=box.SIMPLE, pad_edge=False)
    made.add_column("position")
    for name in ("rows", "median norm", "of all"):
        made.add_column(name, justify="right")
    made.add_column("")
    for each in shape.positions:
        place = str(each.first) if each.first == each.last else f"{each.first} to {each.last}"
        told = "perhaps an attention sink: --skip-first leaves it out" if each.ratio >= _SINK else ""
        made.add_row(place, count(each.rows), f"{each.norm:.4g}", f"{each.ratio:.3g}", Text(told))
    return made

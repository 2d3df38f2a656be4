"""The page that compares the SAEs of a run: FVU against L0, and a table that leads to the report of each."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from flashsae.architecture import architecture_named
from flashsae.errors import ConfigError, require
from flashsae.files.atomic import write_atomic
from flashsae.metrics import METRICS
from flashsae.metrics.numbers import percent, real
from flashsae.metrics.table import of_evaluation
from flashsae.report.cards import printable
from flashsae.report.drawing import Points, pareto
from flashsae.report.evaluation_file import read_evaluation
from flashsae.report.plots import Plot
from flashsae.report.render import template
from flashsae.report.setting_text import setting_text
from flashsae.settings.run import CONFIG_FILE, load_settings
from flashsae.train.failure import failure_in

COMPARISON_FILE = "comparison.html"
_NOT_TOLD = ("activations", "sae", "evaluate_every_steps", "log_every_steps")
_DERIVED = ("lr", "k_aux", "warmup_steps")
"""Settings that follow from others where they are left open: told where nothing else that differs explains them."""
_FIGURES = ("fvu", "l0", "dead_latents", "tokens_per_second")


@dataclass(frozen=True)
class Compared:
    """One SAE of a run.

    Args:
        folder: its own.
        settings: of its config.toml.
        evaluation: its figures; None where it failed.
        failure: why it failed.
    """

    folder: Path
    settings: dict[str, Any]
    evaluation: dict[str, Any] | None
    failure: str | None

    @property
    def hookpoint(self) -> str:
        """Where it reads."""
        return str(self.settings.get("hookpoint", ""))

    @property
    def architecture(self) -> str:
        """What it is called."""
        name = str(self.settings.get("arch", ""))
        try:
            return architecture_named(name).title
        except ConfigError:  # not registered here
            return name


def render_comparison(run: Path, folders: Sequence[Path]) -> Path:
    """Write RUN/comparison.html; an older one is replaced.

    Args:
        run: folder of the run.
        folders: of its SAEs, in it.
    Returns:
        path of the page.
    Raises:
        CheckpointError: a file is missing or damaged; the message says which and what to do.
        MissingExtraError: matplotlib or jinja2 is not installed.
        StorageError: the file system refused.
    """
    page = template(require("jinja2", "report"), "comparison.html.j2").render(_context(run, read_compared(folders)))
    path = run / COMPARISON_FILE
    write_atomic(path, page)
    return path


def comparison_table(folders: Sequence[Path]) -> Table:
    """Return the figures of several SAEs, a row each, for a terminal."""
    made = Table(title="Comparison", title_justify="left", box=box.SIMPLE, pad_edge=False)
    made.add_column("SAE", overflow="fold")
    for name in _FIGURES:
        made.add_column(of_evaluation(name).label, justify="right")
    for sae in read_compared(folders):
        figures = ["failed", *[""] * (len(_FIGURES) - 1)] if sae.evaluation is None else _figures(sae.evaluation)
        made.add_row(sae.folder.name, *figures)
    return made


def read_compared(folders: Sequence[Path]) -> list[Compared]:
    """Return the SAEs of a run: settings and figures of each, or why it failed.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found = []
    for folder in folders:
        failure = failure_in(folder)
        evaluation = None if failure is not None else read_evaluation(folder / "evaluation.json")
        found.append(Compared(folder, load_settings(folder / CONFIG_FILE), evaluation, failure))
    return found


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    return [of_evaluation(name).show(evaluation.get(name)) for name in _FIGURES]


def _context(run: Path, saes: Sequence[Compared]) -> dict[str, Any]:
    """Gather what the template shows. All text in it is escaped there, except figures, style and script: ours."""
    markup = require("markupsafe", "report").Markup
    here = Path(__file__)
    script = here.with_name("comparison.js").read_text("utf-8")
    style = "".join(here.with_name(name).read_text("utf-8") for name in ("style.css", "comparison.css"))
    differ = differing(saes)
    models = {str(sae.settings.get("model", "")) for sae in saes} - {""}
    plots = comparing_plots(saes)
    rows = [_row(sae, differ) for sae in saes]
    return {
        "title": setting_text(models.pop()) if len(models) == 1 else "Sparse autoencoders",
        "count": len(saes),
        "failed": [{"name": sae.folder.name, "why": printable(sae.failure)} for sae in saes if sae.failure is not None],
        "plots": [{"name": p.name, "title": p.title, "caption": p.caption, "svg": markup(p.svg)} for p in plots],
        "columns": [
            {"text": text, "is_number": any(row["cells"][number]["is_number"] for row in rows)}
            for number, text in enumerate([*differ, *(of_evaluation(name).label for name in _FIGURES)])
        ],
        "rows": rows,
        "captions": [(METRICS[name].label, METRICS[name].caption) for name in ("fvu", "l0", "dead_latents")],
        "shared": shared_settings(saes),
        "style": markup(style),
        "script": markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def differing(saes: Sequence[Compared]) -> list[str]:
    """Return the settings in which some SAEs differ; of what follows from others, only what these do not explain."""
    names = dict.fromkeys(["hookpoint", "arch", *(name for sae in saes for name in sae.settings)])
    found = [
        name
        for name in names
        if name not in _NOT_TOLD and len({repr(sae.settings[name]) for sae in saes if name in sae.settings}) > 1
    ]
    chosen = [name for name in found if name not in _DERIVED]
    by_chosen: dict[str, dict[str, str]] = {name: {} for name in found if name in _DERIVED}
    for name, seen in by_chosen.items():
        for sae in saes:
            key = repr([sae.settings.get(other) for other in ("d_sae", "d_in", "auxk", "tokens", "batch_tokens")])
            if seen.setdefault(key, repr(sae.settings.get(name))) != repr(sae.settings.get(name)):
                chosen.append(name)
                break
    return chosen


def _row(sae: Compared, differ: Sequence[str]) -> dict[str, Any]:
    values = [sae.settings.get(name) for name in differ]
    cells = [
        {"text": "" if value is None else setting_text(value), "key": real(value), "is_number": real(value) is not None}
        for value in values
    ]
    evaluation = sae.evaluation or {}
    for name in _FIGURES:
        value, text = real(evaluation.get(name)), ""
        if sae.evaluation is not None:
            text = of_evaluation(name).show(evaluation.get(name))
        if name == "dead_latents" and value is not None and real(evaluation.get("d_sae")):
            text = f"{text} ({percent(value / evaluation['d_sae'])})"
        cells.append({"text": text, "key": value, "is_number": True})
    return {"name": sae.folder.name, "has_report": (sae.folder / "report.html").exists(), "cells": cells,
            "failed": sae.failure is not None}  # fmt: skip


def shared_settings(saes: Sequence[Compared]) -> list[tuple[str, str]]:
    """Return the settings that all SAEs have alike."""
    first = saes[0].settings
    return [
        (name, setting_text(value))
        for name, value in first.items()
        if name not in _NOT_TOLD and all(name in sae.settings and sae.settings[name] == value for sae in saes)
    ]


def comparing_plots(saes: Sequence[Compared]) -> list[Plot]:
    """Draw FVU against L0 of each hookpoint: a line for each architecture, and for each size or rate that differs."""
    measured = [sae for sae in saes if sae.evaluation is not None]
    apart = [name for name in differing(measured) if name not in ("hookpoint", "arch", "seed", *_sparsities(measured))]
    plots = []
    for number, hookpoint in enumerate(dict.fromkeys(sae.hookpoint for sae in measured)):
        found: dict[str, list[tuple[float, float]]] = {}
        for sae in measured:
            x, y = (real((sae.evaluation or {}).get(name)) for name in ("l0", "fvu"))
            if sae.hookpoint == hookpoint and x is not None and y is not None and x > 0 and y > 0:
                told = [f"{name} {setting_text(sae.settings[name])}" for name in apart if name in sae.settings]
                found.setdefault(", ".join([sae.architecture, *told]), []).append((x, y))
        lines: dict[str, Points] = {}
        for label, points in found.items():
            x_of_all, y_of_all = zip(*sorted(points))
            lines[label] = np.array(x_of_all), np.array(y_of_all)
        if lines:
            svg = pareto(f"pareto-{number}", lines, (METRICS["l0"].unit, of_evaluation("fvu").label))
            title = setting_text(hookpoint) if hookpoint else "FVU against L0"
            plots.append(Plot(f"pareto-{number}", title, _caption(lines), svg))
    return plots


def _sparsities(saes: Sequence[Compared]) -> set[str]:
    """Return the settings that say how sparse SAEs of these architectures are: of each its first."""
    names = {str(sae.settings.get("arch", "")) for sae in saes}
    found = set()
    for name in names:
        try:
            found.add(fields(architecture_named(name).settings)[0].name)
        except (ConfigError, IndexError):  # not registered here, or without settings
            continue
    return found


def _caption(lines: Mapping[str, Points]) -> str:
    """Say what the SAEs of a hookpoint reach."""
    told = []
    for architecture, (x, y) in lines.items():
        row = of_evaluation("fvu")
        ends = [
            f"FVU {row.show(float(y[i]))} at L0 {METRICS['l0'].show(float(x[i]))}"
            for i in ((0, -1) if len(x) > 1 else (0,))
        ]
        told.append(f"{architecture}: {', '.join(ends)}")
    return f"Each dot is an SAE; lower and further left is better. {'; '.join(told)}."

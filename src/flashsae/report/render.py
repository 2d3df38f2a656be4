"""Write report.html of a training run: one file that needs neither a network nor anything beside it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from flashsae.architecture import Architecture, architecture_named
from flashsae.architecture.sites import width_told
from flashsae.errors import CheckpointError, ConfigError, require
from flashsae.files.atomic import write_atomic
from flashsae.files.documents import SEAL, load_json, load_tensors
from flashsae.logs.jsonl import read_log
from flashsae.metrics import METRICS, Metric, table
from flashsae.metrics.numbers import compact, count, duration, real
from flashsae.metrics.table import of_evaluation
from flashsae.report.cards import card, known_of_all, sample_text
from flashsae.report.drawing import Array
from flashsae.report.evaluation_file import read_evaluation
from flashsae.report.plots import Plot, latent_map, latent_plots, training_plots
from flashsae.report.setting_text import flat, setting_text
from flashsae.report.shades import stylesheet
from flashsae.report.sites import site_plots, sites_of
from flashsae.report.snippet_file import Snippets, read_snippets
from flashsae.report.summary import final_figures
from flashsae.settings.kinds import as_json
from flashsae.settings.run import load_settings

_ARRAYS = ("latent_density", "decoder_norm", "nearest_decoder_cosine")
_OPTIONAL_ARRAYS = ("encoder_decoder_cosine", "is_dead")
_BETTER = {None: "", "lower": " Lower is better.", "higher": " Higher is better."}


@dataclass(frozen=True)
class _Run:
    path: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    arrays: dict[str, Array]
    snippets: Snippets | None


def render_report(run: Path) -> Path:
    """Write RUN/report.html from the files of a finished run; an older report is replaced.

    Args:
        run: folder with config.toml, metrics.jsonl, evaluation.json, latents.safetensors and, if the run read
            text, snippets.json.
    Returns:
        path of the report.
    Raises:
        CheckpointError: a file is missing or damaged; the message says which and what to do.
        MissingExtraError: matplotlib or jinja2 is not installed.
        StorageError: the file system refused.
    """
    run = Path(run)
    jinja2 = require("jinja2", "report")
    loaded = _load(run)
    page = template(jinja2, "template.html.j2").render(_context(loaded))
    report = run / "report.html"
    write_atomic(report, page)
    return report


@functools.cache
def template(jinja2: Any, name: str) -> Any:
    """Return a template of this folder, which escapes what it is given."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("flashsae.report", ""),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _load(run: Path) -> _Run:
    if not (run / "config.toml").is_file():
        raise CheckpointError(f"{run} is not the folder of a training run: it has no config.toml.")
    settings = load_settings(run / "config.toml")
    of_text = ("snippets.json",) if settings.get("model") else ()
    for name in ("metrics.jsonl", "evaluation.json", "latents.safetensors", *of_text):
        if not (run / name).is_file():
            raise CheckpointError(
                f"{run} has no {name}, so its training has not finished: "
                f"finish it with `flashsae train --resume {run}`, then ask for the report again."
            )
    snippets = run / "snippets.json"
    metrics, evaluation = read_log(run / "metrics.jsonl"), read_evaluation(run / "evaluation.json")
    must_be_logged = metrics or SEAL in load_json(run / "evaluation.json")  # written since there are checksums
    if must_be_logged and max((record["step"] for record in metrics), default=0) != evaluation["steps"]:
        raise CheckpointError(
            f"{run / 'metrics.jsonl'} is damaged: it does not end with step {evaluation['steps']:.0f}, the last one of "
            "the training. Put a copy of it back."
        )
    return _Run(
        run,
        settings,
        metrics,
        evaluation,
        read_arrays(run / "latents.safetensors"),
        read_snippets(snippets) if snippets.exists() else None,
    )


def read_arrays(path: Path) -> dict[str, Array]:
    """Return what latents.safetensors of a run says of every latent: [d_sae] each, and of sites [d_sae, sites].

    Raises:
        CheckpointError: it is missing, damaged, or lacks what every run writes.
    """
    tensors = load_tensors(path)
    d_sae = tensors["latent_density"].shape if "latent_density" in tensors else None
    for name in _ARRAYS:
        if name not in tensors or tensors[name].dim() != 1 or tensors[name].shape != d_sae:
            got = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{path}: expected an array '{name}' of shape [d_sae], got {got}; "
                f"write it again with `flashsae train --resume {path.parent}`."
            )
    known = [*_ARRAYS, *(name for name in _OPTIONAL_ARRAYS if name in tensors and tensors[name].shape == d_sae)]
    norms = tensors.get("site_norms")
    if norms is not None and norms.dim() == 2 and norms.shape[:1] == d_sae:
        known.append("site_norms")
    return {name: tensors[name].double().numpy() for name in known}


def _context(run: _Run) -> dict[str, Any]:
    """Gather what the template shows. All text in it is escaped there, except figures, style and script: ours."""
    markup = require("markupsafe", "report").Markup
    script, style = (Path(__file__).with_name(name).read_text("utf-8") for name in ("script.js", "style.css"))
    pictures = run.snippets.pictures if run.snippets else []
    latents = [] if run.snippets is None else [card(latent, pictures) for latent in run.snippets.latents]
    architecture = known_architecture(run.evaluation)
    rows = table(architecture.terms if architecture else ())
    has_map = bool(latents) and "encoder_decoder_cosine" in run.arrays

    def safe(plots: list[Plot]) -> list[dict[str, str]]:
        return [{"name": p.name, "title": p.title, "caption": p.caption, "svg": markup(p.svg)} for p in plots]

    return {
        "title": _title(run),
        "provenance": _provenance(run, architecture),
        "summary": _summary(run),
        "training": safe(training_plots(run.metrics, run.evaluation, run.settings, rows)),
        "dictionary": safe(dictionary_plots(run.arrays, run.evaluation)),
        "map": safe([latent_map(run.arrays, [latent["index"] for latent in latents])]) if has_map else [],
        "read_text": run.snippets is not None,
        "snippet_tokens": compact(run.snippets.tokens) if run.snippets else "",
        "sample": sample_text(run.snippets) if run.snippets else "",
        "latents": latents,
        "known": known_of_all(run.arrays, run.snippets),
        "metrics": _metrics(run, rows),
        "settings": [(name, setting_text(value)) for name, value in flat(run.settings)],
        "style": markup(style + stylesheet(run.snippets)),
        "of_images": bool(pictures),
        "unit": run.snippets.unit if run.snippets else "tokens",
        "script": markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def dictionary_plots(arrays: Mapping[str, Array], evaluation: Mapping[str, Any]) -> list[Plot]:
    """Draw what the latents of a run are like, and over which sites they are spread where it has several.

    Args:
        arrays: as `read_arrays` returns them.
        evaluation: the content of evaluation.json.
    """
    return [*latent_plots(arrays), *site_plots(arrays, list(sites_of(evaluation["settings"])))]


def _title(run: _Run) -> dict[str, str]:
    model, hookpoint = run.settings.get("model"), run.settings.get("hookpoint")
    return {
        "model": setting_text(model) if model else "Sparse autoencoder",
        "hookpoint": setting_text(hookpoint) if hookpoint else "",
    }


def _provenance(run: _Run, architecture: Architecture | None) -> list[tuple[str, str]]:
    """Name where the run comes from, in a few words each; what is not known is left out."""
    e, settings = run.evaluation, run.settings
    finished = datetime.fromtimestamp((run.path / "evaluation.json").stat().st_mtime, timezone.utc)
    try:
        version = metadata.version("flashsae")
    except metadata.PackageNotFoundError:
        version = "unknown"
    seconds = real(e.get("train_seconds"))
    kind = architecture.title if architecture else e.get("architecture")
    own = [
        f"{name} = {setting_text(value)}"
        for name, value in _own(e["settings"], architecture).items()
        if _is_told(value)
    ]
    d_out = real(settings.get("d_out"))
    to = f" → {count(d_out)}" if d_out is not None and d_out != e["d_in"] else ""
    wide = width_told(list(sites_of(e["settings"]).values())) or count(e["d_in"])
    sizes = f"{wide} → {count(e['d_sae'])} latents{to}"
    sae = ", ".join([*([setting_text(kind)] if kind else []), sizes, *own])
    facts = [
        ("data", settings.get("dataset")),
        ("SAE", sae),
        ("trained", f"{count(e['steps'])} steps" + (f" in {duration(seconds)}" if seconds else "")),
        ("finished", finished.strftime("%d %B %Y").lstrip("0")),
        ("flashsae", settings.get("flashsae_version") or version),
    ]
    return [(name, setting_text(value)) for name, value in facts if value]


def _own(settings: Mapping[str, Any], architecture: Architecture | None) -> dict[str, Any]:
    """Return what is worth telling of the settings of an architecture, where that is known, as `told` does."""
    defaults = {} if architecture is None else as_json(asdict(architecture.settings()))
    first = next(iter(defaults), None)
    return {
        name: value
        for name, value in settings.items()
        if name == first or name not in defaults or value != defaults[name]
    }


def _is_told(setting: Any) -> bool:
    return isinstance(setting, str | bool) or real(setting) is not None


def known_architecture(evaluation: Mapping[str, Any]) -> Architecture | None:
    """Return what is known of the kind of SAE that was measured; None where it is not registered here."""
    try:
        return architecture_named(str(evaluation.get("architecture")))
    except ConfigError:
        return None


def _summary(run: _Run) -> list[dict[str, Any]]:
    """Return the final figures as the terminal prints them, each with what it is measured on."""
    e = run.evaluation
    after = real(run.settings.get("dead_after_tokens"))
    notes = {
        "fvu": f"on {count(e['held_out_tokens'])} {METRICS['held_out_tokens'].label}",
        "l0": METRICS["l0"].unit,
        "dead_latents": f"not active on the last {count(after)} training tokens" if after is not None else "",
        "tokens_per_second": "in training",
    }
    cards = [
        {"name": figure.name, "value": figure.value, "notes": [figure.note, notes.get(figure.metric, "")]}
        for figure in final_figures(e)
    ]
    seen = {
        "name": METRICS["train_tokens"].label,
        "value": compact(e["train_tokens"]),
        "notes": [f"{count(e['train_tokens'])} in training"],
    }
    unit = run.snippets.unit if run.snippets else "tokens"
    return [
        {
            "name": _of(unit, str(card["name"])),
            "value": card["value"],
            "notes": [_of(unit, str(note)) for note in card["notes"]],
        }
        for card in [*cards, seen]
    ]


def _of(unit: str, told: str) -> str:
    """Return what is told of tokens as told of what they are here."""
    if unit == "tokens":
        return told
    told = re.sub(r"\btokens\b", unit, re.sub(r"\btoken\b", {"patches": "patch", "images": "image"}[unit], told))
    return re.sub(r"\bTokens\b", unit.capitalize(), told)


def _metrics(run: _Run, rows: Mapping[str, Metric]) -> list[tuple[str, str, str]]:
    """Return name, caption and formula of everything that this run logged or ended with and that has a formula."""
    logged = (name for record in run.metrics for name in record)
    ended = (of_evaluation(name).name for name in run.evaluation if name in METRICS)
    names = dict.fromkeys((*logged, *ended, *run.arrays))
    found = (row for row in rows.values() if row.name in names and row.formula)
    return [(row.name, f"{row.caption}{_BETTER[row.direction]}", row.formula) for row in found]

"""Write report.html of a training run: one file that needs neither a network nor anything beside it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from flashsae.errors import CheckpointError, require
from flashsae.files import load_json, load_tensors, write_atomic
from flashsae.report.plots import Array, Plot, latent_map, latent_plots, training_plots
from flashsae.report.snippets import LatentSnippets, Snippet, Snippets, read_snippets
from flashsae.train.callbacks import read_log

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ARRAYS = ("latent_density", "decoder_norm", "encoder_decoder_cosine", "nearest_decoder_cosine")
_EVALUATION = ("fvu", "l0", "dead_latents", "d_in", "d_sae", "held_out_tokens", "train_tokens", "steps")
_OPEN_SNIPPETS = 4
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would break lines, turn the reading direction or not encode: each is shown as U+FFFD."""


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
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("flashsae.report", ""),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html.j2").render(_context(loaded))
    report = run / "report.html"
    write_atomic(report, page)
    return report


def _load(run: Path) -> _Run:
    if not (run / "config.toml").is_file():
        raise CheckpointError(f"{run} is not the folder of a training run: it has no config.toml.")
    try:
        settings = tomllib.loads((run / "config.toml").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {run / 'config.toml'}: it is damaged ({error}).") from error
    of_text = ("snippets.json",) if settings.get("model") else ()
    for name in ("metrics.jsonl", "evaluation.json", "latents.safetensors", *of_text):
        if not (run / name).is_file():
            raise CheckpointError(
                f"{run} has no {name}, so its training has not finished: "
                f"finish it with `flashsae train --resume {run}`, then ask for the report again."
            )
    snippets = run / "snippets.json"
    return _Run(
        run,
        settings,
        read_log(run / "metrics.jsonl"),
        _read_evaluation(run / "evaluation.json"),
        _read_arrays(run / "latents.safetensors"),
        read_snippets(snippets) if snippets.exists() else None,
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    stored = load_json(path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} is damaged: expected an object, got {type(stored).__name__}.")
    for name in _EVALUATION:
        if isinstance(stored.get(name), bool) or not isinstance(stored.get(name), (int, float)):
            raise CheckpointError(
                f"{path}: expected a number named '{name}', got {stored.get(name)!r}; "
                f"write it again with `flashsae train --resume {path.parent}`."
            )
    return stored


def _read_arrays(path: Path) -> dict[str, Array]:
    tensors = load_tensors(path)
    d_sae = tensors["latent_density"].shape if "latent_density" in tensors else None
    for name in _ARRAYS:
        if name not in tensors or tensors[name].dim() != 1 or tensors[name].shape != d_sae:
            got = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{path}: expected an array '{name}' of shape [d_sae], got {got}; "
                f"write it again with `flashsae train --resume {path.parent}`."
            )
    return {name: tensors[name].double().numpy() for name in _ARRAYS}


def _context(run: _Run) -> dict[str, Any]:
    """Gather what the template shows. All text in it is escaped there, except figures, style and script: ours."""
    markup = require("markupsafe", "report").Markup
    script, style = (Path(__file__).with_name(name).read_text("utf-8") for name in ("script.js", "style.css"))
    latents = [] if run.snippets is None else [_card(latent) for latent in run.snippets.latents]

    def safe(plots: list[Plot]) -> list[dict[str, str]]:
        return [{"name": p.name, "title": p.title, "caption": p.caption, "svg": markup(p.svg)} for p in plots]

    return {
        "title": _title(run),
        "provenance": _provenance(run),
        "summary": _summary(run.evaluation),
        "training": safe(training_plots(run.metrics, run.evaluation)),
        "dictionary": safe(latent_plots(run.arrays)),
        "map": safe([latent_map(run.arrays, [latent["index"] for latent in latents])]) if latents else [],
        "read_text": run.snippets is not None,
        "snippet_tokens": _compact(run.snippets.tokens) if run.snippets else "",
        "latents": latents,
        "settings": [(name, _setting(value)) for name, value in _flat(run.settings)],
        "style": markup(style),
        "script": markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _title(run: _Run) -> dict[str, str]:
    model, hookpoint = run.settings.get("model"), run.settings.get("hookpoint")
    return {
        "model": printable(str(model)) if model else "Sparse autoencoder",
        "hookpoint": printable(str(hookpoint)) if hookpoint else "",
    }


def _provenance(run: _Run) -> list[tuple[str, str]]:
    """Name where the run comes from, in a few words each; what is not known is left out."""
    e, settings = run.evaluation, run.settings
    finished = datetime.fromtimestamp((run.path / "evaluation.json").stat().st_mtime, timezone.utc)
    try:
        version = metadata.version("flashsae")
    except metadata.PackageNotFoundError:
        version = "unknown"
    seconds = e.get("train_seconds")
    facts = [
        ("data", settings.get("dataset")),
        ("shape", f"{e['d_in']:,} → {e['d_sae']:,} latents" + (f", k = {e['k']}" if e.get("k") else "")),
        ("trained", f"{e['steps']:,} steps" + (f" in {_duration(seconds)}" if seconds else "")),
        ("finished", finished.strftime("%d %B %Y").lstrip("0")),
        ("flashsae", settings.get("flashsae_version") or version),
    ]
    return [(name, printable(str(value))) for name, value in facts if value]


def _summary(e: Mapping[str, Any]) -> list[dict[str, str]]:
    dead = e["dead_latents"] / e["d_sae"] if e["d_sae"] else 0.0
    explained = f"{100 * (1 - e['fvu']):.1f} % of variance explained" if math.isfinite(e["fvu"]) else "not finite"
    cards = [
        ("Held-out FVU", f"{e['fvu']:.4f}", f"{explained}, {_compact(e['held_out_tokens'])} tokens"),
        ("L0", f"{e['l0']:.4g}", "active latents per token"),
        ("Dead latents", f"{e['dead_latents']:,.0f}", f"{_percent(dead)} of {e['d_sae']:,}"),
        ("Tokens seen", _compact(e["train_tokens"]), f"{e['train_tokens']:,} in training"),
    ]
    if e.get("tokens_per_second"):
        cards.append(("Throughput", _compact(e["tokens_per_second"]), "tokens per second"))
    return [{"name": name, "value": value, "note": note} for name, value, note in cards]


def _card(latent: LatentSnippets) -> dict[str, Any]:
    tallest = max(latent.histogram, default=0)
    snippets = [_segments(snippet, latent.max_act) for snippet in latent.snippets]
    return {
        "index": latent.index,
        "density": latent.density,
        "density_text": _percent(latent.density),
        "max_act": f"{latent.max_act:.3g}",
        "mean_act": f"{latent.mean_act:.3g}",
        "top_tokens": [printable(token) for token in latent.top_tokens],
        # The square root keeps rare large values visible beside many small ones.
        "bars": [round(math.sqrt(count / tallest), 3) if tallest else 0.0 for count in latent.histogram],
        "snippets": snippets[:_OPEN_SNIPPETS],
        "more": snippets[_OPEN_SNIPPETS:],
    }


def _segments(snippet: Snippet, max_act: float) -> list[dict[str, Any]]:
    """Split a text into runs of plain tokens and single tokens that fire, weight = value / max_act."""
    segments: list[dict[str, Any]] = []
    for i, (token, act) in enumerate(zip(snippet.tokens, snippet.acts)):
        text = printable(token)
        bare = text.lstrip(" ")
        plain = text if act <= 0 or not bare else text[: len(text) - len(bare)]
        if plain and segments and not segments[-1]["value"]:
            segments[-1]["text"] += plain
        elif plain:
            segments.append({"text": plain, "value": "", "weight": 0.0, "peak": False})
        if act > 0 and bare:
            weight = round(min(act / max_act, 1.0), 2) if max_act > 0 else 0.0
            segments.append({"text": bare, "value": f"{act:.3g}", "weight": weight, "peak": i == snippet.peak})
    return segments


def printable(text: str) -> str:
    """Return text with line breaks as ↵ and other control characters as U+FFFD."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\n", "↵ ").replace("\t", " "))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List settings by name, tables within as table.name."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return printable(str(value).lower() if isinstance(value, bool) else str(value))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else "100 %"


def _compact(value: float) -> str:
    """Write a count in at most four characters and a unit: 950, 12.3k, 4.1M, 2.5B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

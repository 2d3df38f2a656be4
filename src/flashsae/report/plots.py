"""The figures of the report, each with a caption that says what can be seen in it: with its figures, never a guess."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashsae.metrics.numbers import real
from flashsae.metrics.table import HELD_OUT, METRICS, Metric, bare
from flashsae.report.drawing import MOST_DOTS, Array, Points, curve, dots, histogram

_MOST_POINTS = 1200


@dataclass(frozen=True)
class Plot:
    """One figure with what can be seen in it.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        title: one or a few words.
        caption: a sentence or a few, plain text.
        svg: an `<svg>` element.
    """

    name: str
    title: str
    caption: str
    svg: str


def training_plots(
    metrics: list[dict[str, Any]],
    evaluation: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    rows: Mapping[str, Metric] = METRICS,
) -> list[Plot]:
    """Draw how the run went: what the table gives an axis, and what was logged that it does not know.

    A quantity that was not logged has no figure.

    Args:
        metrics: records with "step" and numbers by name.
        evaluation: with "steps" and the final "fvu", the last point of the held-out curve.
        settings: of the run, for captions; what is not among them is not spoken of.
        rows: the table, with the terms of the loss.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    logged = dict.fromkeys(name for record in metrics for name in record)
    unknown = [name for name in logged if name not in rows and name.removeprefix(HELD_OUT) not in rows]
    plots = []
    for number, row in enumerate((*rows.values(), *map(bare, unknown))):
        points = _series(metrics, row.name)
        if row.axis is None or not points[0].size:
            continue
        held_out = _held_out(metrics, evaluation, row.name)
        lines = {"training": points, "held out": held_out} if held_out[0].size else {row.title: points}
        name = row.name if re.fullmatch("[A-Za-z][A-Za-z0-9_]*", row.name) else f"logged-{number}"  # fit for an id
        svg = curve(name, lines, "step", log=row.axis == "log")
        caption = [row.caption, _courses(row, points, held_out)]
        if row.name == "dead_latents":
            caption.append(_window(evaluation, settings or {}))
        plots.append(Plot(name, row.title, " ".join(filter(None, caption)), svg))
    return plots


def _courses(row: Metric, training: Points, held_out: Points) -> str:
    course = _course(row, training)
    if not held_out[0].size:
        return f"{course[0].upper()}{course[1:]}."
    return f"Batches of training: {course}. Held-out tokens: {_course(row, held_out)}."


def _course(row: Metric, points: Points) -> str:
    """Say where a curve starts and ends, and its lowest and highest point where they are neither."""
    steps, values = points
    shown = [row.show(value) for value in values]
    if len(steps) > 1 and len(set(shown)) == 1:
        return f"{shown[0]} throughout"
    said = [f"{shown[i]} at step {steps[i]:,.0f}" for i in ((0, -1) if len(steps) > 1 else (0,))]
    for word, i in (("lowest", int(values.argmin())), ("highest", int(values.argmax()))):
        if shown[i] not in (shown[0], shown[-1]):
            said.append(f"{word} {shown[i]} at step {steps[i]:,.0f}")
    return ", ".join(said)


def _window(evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say how long a latent must be silent to count as dead, and if that is more than the whole training."""
    after, tokens = real(settings.get("dead_after_tokens")), real(evaluation.get("train_tokens"))
    if after is None:
        return ""
    is_short = tokens is not None and tokens < after
    none = f" None can be dead after the {tokens:,.0f} tokens of this run." if is_short else ""
    return f"dead_after_tokens is {after:,.0f}.{none}"


def latent_plots(arrays: Mapping[str, Array]) -> list[Plot]:
    """Draw the distribution over latents of density, decoder norm and the two cosines.

    Args:
        arrays: [d_sae] each: latent_density, and those of decoder_norm, encoder_decoder_cosine,
            nearest_decoder_cosine and is_dead that are known. Values that are not finite are left out.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density = _finite(arrays["latent_density"])
    active = density[density > 0]
    row = METRICS["latent_density"]
    plots = [
        Plot(
            "density",
            row.title,
            f"{row.caption}{_silent(arrays, active, density.size - active.size)}",
            histogram("density", np.log10(active), row.unit, log=True),
        )
    ]
    for name, metric, seen, right in (
        ("norm", "decoder_norm", _range, None),
        ("alignment", "encoder_decoder_cosine", _few_below, 1.0),
        ("nearest", "nearest_decoder_cosine", _many_above, 1.0),
    ):
        if metric in arrays:
            values, row = _finite(arrays[metric]), METRICS[metric]
            caption = f"{row.caption} {seen(values)}" if values.size else row.caption
            plots.append(Plot(name, row.title, caption, histogram(name, values, row.unit, right=right)))
    return plots


def _range(values: Array) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return f"{low} throughout." if low == high else f"From {low} to {high}."


def _few_below(values: Array) -> str:
    return f"{int((values < 0.1).sum()):,} of {values.size:,} are below 0.1."


def _many_above(values: Array) -> str:
    return f"{int((values > 0.9).sum()):,} of {values.size:,} latents have a neighbour above 0.9."


def _silent(arrays: Mapping[str, Array], active: Array, n_silent: int) -> str:
    if not n_silent:
        return f" All {active.size:,} were active." if active.size else ""
    was, are = ("was", "is") if n_silent == 1 else ("were", "are")
    said = f" {n_silent:,} of {active.size + n_silent:,} {was} not active on this sample and {are} not drawn"
    if "is_dead" in arrays:
        dead = int(((arrays["latent_density"] == 0) & (arrays["is_dead"] > 0)).sum())
        return f"{said}; {dead:,} of these {'was' if dead == 1 else 'were'} dead at the end of training."
    return f"{said}, which is less than dead: that is counted in training."


def latent_map(arrays: Mapping[str, Array], shown: list[int]) -> Plot:
    """Draw latents by density and by agreement of encoder and decoder; those shown link to their cards.

    Args:
        arrays: as for `latent_plots`.
        shown: latents with a card, whose element has the id "latent-<number>".
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density, cosine = arrays["latent_density"], arrays["encoder_decoder_cosine"]
    n_active = int((np.isfinite(cosine) & np.isfinite(density) & (density > 0)).sum())
    some = f", {MOST_DOTS:,} of which are drawn" if n_active > MOST_DOTS else ""
    caption = (
        f"Each dot is one of the {n_active:,} latents that were active on the sample{some}: frequent ones to the "
        "right, those that write what they read at the top. Coloured dots lead to their card below."
    )
    svg = dots("map", density, cosine, shown, (METRICS["latent_density"].unit, "encoder–decoder cosine"))
    return Plot("map", "Map of latents", caption, svg)


def _held_out(metrics: list[dict[str, Any]], evaluation: Mapping[str, Any], name: str) -> Points:
    """Return what was logged of held-out tokens, ending with the final figure, which may be of more tokens."""
    steps, values = _series(metrics, f"{HELD_OUT}{name}")
    end, final = real(evaluation["steps"]), real(evaluation.get(name))
    if end is None or final is None or f"{HELD_OUT}{name}" not in METRICS:
        return steps, values
    before = steps < end
    return np.append(steps[before], end), np.append(values[before], final)


def _series(metrics: list[dict[str, Any]], name: str) -> Points:
    """Return steps and values of one quantity, thinned; of a step that a resumed run logged again, the later."""
    logged = [(real(record.get("step")), real(record.get(name))) for record in metrics]
    by_step = {step: value for step, value in logged if step is not None and value is not None}
    steps = np.array(sorted(by_step), dtype=np.float64)
    values = np.array([by_step[step] for step in sorted(by_step)], dtype=np.float64)
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept = np.linspace(0, len(steps) - 1, _MOST_POINTS).round().astype(int)
    return steps[kept], values[kept]


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]

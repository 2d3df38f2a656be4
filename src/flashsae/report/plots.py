"""The figures of the report, each with a caption that says what can be seen in it: with its figures, never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashsae.report.drawing import MOST_DOTS, Array, Points, curve, dots, histogram, number
from flashsae.report.summary import fvu_text, real

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
    metrics: list[dict[str, Any]], evaluation: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> list[Plot]:
    """Draw how the run went. A quantity that was not logged has no figure.

    Args:
        metrics: records with "step" and some of fvu, held_out_fvu, l0, dead_latents, lr.
        evaluation: with "steps" and the final "fvu", the last point of the held-out curve.
        settings: of the run, for captions; what is not among them is not spoken of.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    settings = settings or {}
    plots = []
    fvu, held_out = _series(metrics, "fvu"), _held_out(metrics, evaluation)
    if fvu[0].size:
        lines = {"training": fvu} | ({"held out": held_out} if held_out[0].size else {})
        svg = curve("fvu", lines, "step", log=True)
        plots.append(Plot("fvu", "Unexplained variance (FVU)", _fvu_caption(fvu, held_out), svg))
    for name, title, caption in (
        ("l0", "Active latents per token (L0)", _l0_caption),
        ("dead_latents", "Dead latents", _dead_caption),
        ("lr", "Learning rate", _lr_caption),
    ):
        points = _series(metrics, name)
        if points[0].size:
            svg = curve(name, {title: points}, "step", log=False)
            plots.append(Plot(name, title, caption(points, evaluation, settings), svg))
    return plots


def _fvu_caption(training: Points, held_out: Points) -> str:
    caption = f"Fraction of the variance that the SAE does not explain. Batches of training: {_course(training)}."
    return caption + (f" Held-out tokens: {_course(held_out)}." if held_out[0].size else "")


def _course(points: Points) -> str:
    """Say where a curve of FVU starts and ends, and its lowest point where that is neither."""
    steps, values = points
    ends = [f"{fvu_text(values[i])} at step {steps[i]:,.0f}" for i in ((0, -1) if len(steps) > 1 else (0,))]
    lowest = int(values.argmin())
    if 0 < lowest < len(steps) - 1 and fvu_text(values[lowest]) not in (fvu_text(values[0]), fvu_text(values[-1])):
        ends.append(f"lowest {fvu_text(values[lowest])} at step {steps[lowest]:,.0f}")
    return ", ".join(ends)


def _l0_caption(points: Points, evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    k = real(evaluation.get("k", settings.get("k")))
    most = "" if k is None else f" A token can have k = {k:,.0f} at most."
    return f"Mean number of latents above zero in a batch: {_range(points[1])}.{most}"


def _dead_caption(points: Points, evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    steps, values = points
    after, alpha = real(settings.get("dead_after_tokens")), real(settings.get("auxk_alpha"))
    tokens = real(evaluation.get("train_tokens"))
    window = "a set number of" if after is None else f"the last {after:,.0f}"
    caption = (
        f"Latents without a value above zero on {window} training tokens: {values[-1]:,.0f} at the last logged step"
    )
    if values.max() > values[-1]:
        caption += f", {values.max():,.0f} at most (step {steps[values.argmax()]:,.0f})"
    caption += "."
    if after is not None and tokens is not None and tokens < after:
        caption += f" None can be dead after the {tokens:,.0f} tokens of this run."
    if alpha is not None:
        caption += f" The auxiliary loss that revives them has weight {alpha:.3g}." if alpha else ""
        caption += "" if alpha else " The auxiliary loss that revives them is off."
    return caption


def _lr_caption(points: Points, evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    values = points[1]
    if len(values) == 1:
        return f"Of the only logged step: {number(values[0])}."
    most = f", {number(values.max())} at most" if values.max() > max(values[0], values[-1]) else ""
    return f"Of each logged step: {number(values[0])} at the first, {number(values[-1])} at the last{most}."


def _range(values: Array) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return f"{low} throughout" if low == high else f"from {low} to {high}"


def latent_plots(arrays: Mapping[str, Array]) -> list[Plot]:
    """Draw the distribution over latents of density, decoder norm and the two cosines.

    Args:
        arrays: [d_sae] each: latent_density, decoder_norm, encoder_decoder_cosine, nearest_decoder_cosine, and is_dead
            where it is known. Values that are not finite are left out.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density, norm = _finite(arrays["latent_density"]), _finite(arrays["decoder_norm"])
    alignment, nearest = _finite(arrays["encoder_decoder_cosine"]), _finite(arrays["nearest_decoder_cosine"])
    fired = density[density > 0]
    return [
        Plot(
            "density",
            "Latent density",
            _density_caption(arrays, fired, density.size - fired.size),
            histogram("density", np.log10(fired), "fraction of tokens", log=True),
        ),
        Plot(
            "norm",
            "Decoder norm",
            "Length of each decoder row" + (f": {_range(norm)}." if norm.size else "."),
            histogram("norm", norm, "norm"),
        ),
        Plot(
            "alignment",
            "Encoder and decoder agreement",
            "Cosine between what a latent reads and what it writes. "
            f"{int((alignment < 0.1).sum()):,} of {alignment.size:,} are below 0.1.",
            histogram("alignment", alignment, "cosine", right=1.0),
        ),
        Plot(
            "nearest",
            "Nearest decoder neighbour",
            "Largest cosine with any other decoder row; 1 is a duplicate. "
            f"{int((nearest > 0.9).sum()):,} of {nearest.size:,} latents have a neighbour above 0.9.",
            histogram("nearest", nearest, "cosine", right=1.0),
        ),
    ]


def _density_caption(arrays: Mapping[str, Array], fired: Array, n_silent: int) -> str:
    caption = "Fraction of the tokens of the sample on which each latent fires."
    if not n_silent:
        return f"{caption} All {fired.size:,} fired." if fired.size else caption
    caption += f" {n_silent:,} of {fired.size + n_silent:,} did not fire on this sample and are not drawn"
    if "is_dead" in arrays:
        dead = int(((arrays["latent_density"] == 0) & (arrays["is_dead"] > 0)).sum())
        return f"{caption}; {dead:,} of these were dead at the end of training."
    return f"{caption}, which is less than dead: that is counted in training."


def latent_map(arrays: Mapping[str, Array], shown: list[int]) -> Plot:
    """Draw latents by density and by agreement of encoder and decoder; those shown link to their cards.

    Args:
        arrays: as for `latent_plots`.
        shown: latents with a card, whose element has the id "latent-<number>".
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density, cosine = arrays["latent_density"], arrays["encoder_decoder_cosine"]
    n_fired = int((np.isfinite(cosine) & np.isfinite(density) & (density > 0)).sum())
    some = f", {MOST_DOTS:,} of which are drawn" if n_fired > MOST_DOTS else ""
    caption = (
        f"Each dot is one of the {n_fired:,} latents that fired on the sample{some}: frequent ones to the right, those "
        "that write what they read at the top. Coloured dots lead to their card below."
    )
    svg = dots("map", density, cosine, shown, ("fraction of tokens", "encoder–decoder cosine"))
    return Plot("map", "Map of latents", caption, svg)


def _held_out(metrics: list[dict[str, Any]], evaluation: Mapping[str, Any]) -> Points:
    """Return the held-out FVU that was logged, ending with the final one, which may be of more tokens."""
    steps, values = _series(metrics, "held_out_fvu")
    end, final = real(evaluation["steps"]), real(evaluation["fvu"])
    if end is None or final is None:
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

"""The figures of the report: SVG text whose colours are CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashsae.errors import require

Array = NDArray[np.float64]
Points = tuple[Array, Array]

_INK, _MUTED, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_PAPER = "#050505"
_CSS = {
    _PAPER: "var(--paper)",
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--rule)",
    _ACCENT: "var(--accent)",
}
"""Stand-ins that matplotlib draws with, and the variables of style.css that take their place."""
_SIZE = (4.5, 2.1)
_MOST_POINTS = 1200
_MOST_DOTS = 2500
_BINS = 48
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flashsae",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.6,
}


@dataclass(frozen=True)
class Plot:
    """One figure with what a reader should look for in it.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        title: one or a few words.
        caption: a sentence, plain text.
        svg: an `<svg>` element.
    """

    name: str
    title: str
    caption: str
    svg: str


def training_plots(metrics: list[dict[str, Any]], evaluation: Mapping[str, Any]) -> list[Plot]:
    """Draw how the run went. A quantity that was not logged has no figure.

    Args:
        metrics: records with "step" and some of fvu, held_out_fvu, l0, dead_latents, lr.
        evaluation: with "steps" and the final "fvu", the last point of the held-out curve.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    held_out = _series(metrics, "held_out_fvu")
    if not held_out[0].size or held_out[0][-1] < evaluation["steps"]:
        final = (float(evaluation["steps"]), float(evaluation["fvu"]))
        held_out = (np.append(held_out[0], final[0]), np.append(held_out[1], final[1]))
    plots = []
    fvu = _series(metrics, "fvu")
    if fvu[0].size:
        caption = (
            "Fraction of the variance that the SAE does not explain: it should fall and flatten, and held-out "
            "data should stay close to training data."
        )
        svg = _curve("fvu", {"training": fvu, "held out": held_out}, "step", log=True)
        plots.append(Plot("fvu", "Unexplained variance (FVU)", caption, svg))
    for name, title, caption in (
        (
            "l0",
            "Active latents per token (L0)",
            "Mean number of latents above zero: flat at k for a healthy TopK SAE.",
        ),
        (
            "dead_latents",
            "Dead latents",
            "Latents that have not fired for a long while: a rise is normal early on, and the auxiliary loss "
            "should bring it back down.",
        ),
        (
            "lr",
            "Learning rate",
            "The schedule that was followed; kinks in other curves often line up with its own.",
        ),
    ):
        points = _series(metrics, name)
        if points[0].size:
            plots.append(Plot(name, title, caption, _curve(name, {title: points}, "step", log=False)))
    return plots


def latent_plots(arrays: Mapping[str, Array]) -> list[Plot]:
    """Draw the distribution over latents of density, decoder norm and the two cosines.

    Args:
        arrays: [d_sae] each: latent_density, decoder_norm, encoder_decoder_cosine, nearest_decoder_cosine.
            Values that are not finite are left out.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density = _finite(arrays["latent_density"])
    alive = density[density > 0]
    dead = density.size - alive.size
    never = f"{dead:,} of {density.size:,} never fired and are not drawn." if dead else "Every one of them fired."
    nearest = _finite(arrays["nearest_decoder_cosine"])
    twins = int((nearest > 0.9).sum())
    return [
        Plot(
            "density",
            "Latent density",
            "Share of tokens on which each latent fires: look for one broad hump, with neither a spike at the "
            f"far right (always on) nor a second hump far left (almost never). {never}",
            _histogram("density", np.log10(alive), "fraction of tokens", log=True),
        ),
        Plot(
            "norm",
            "Decoder norm",
            "Length of each decoder row: one where training constrains it, otherwise look for outliers.",
            _histogram("norm", _finite(arrays["decoder_norm"]), "norm"),
        ),
        Plot(
            "alignment",
            "Encoder and decoder agreement",
            "Cosine between what a latent reads and what it writes: most should be well above zero; a pile near "
            "zero is usually latents that training never reached.",
            _histogram("alignment", _finite(arrays["encoder_decoder_cosine"]), "cosine", right=1.0),
        ),
        Plot(
            "nearest",
            "Nearest decoder neighbour",
            "Largest cosine with any other decoder row: a spike at one means duplicates. "
            f"{twins:,} of {nearest.size:,} latents have a neighbour above 0.9.",
            _histogram("nearest", nearest, "cosine", right=1.0),
        ),
    ]


def latent_map(arrays: Mapping[str, Array], shown: list[int]) -> Plot:
    """Draw latents by density and by agreement of encoder and decoder; those shown link to their cards.

    Args:
        arrays: as for `latent_plots`.
        shown: latents with a card, whose element has the id "latent-<number>".
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    density, cosine = arrays["latent_density"], arrays["encoder_decoder_cosine"]
    drawn = np.isfinite(density) & (density > 0) & np.isfinite(cosine)
    some = drawn.nonzero()[0]
    some = some[np.linspace(0, len(some) - 1, min(len(some), _MOST_DOTS)).round().astype(int)]
    linked = [latent for latent in shown if latent < len(drawn) and drawn[latent]]
    with _style():
        figure, axes = _axes((9.4, 2.8))
        x = np.log10(np.where(drawn, density, 1.0))
        axes.plot(x[some], cosine[some], ls="", marker="o", ms=2.2, mew=0, color=_MUTED, alpha=0.35)
        dots = axes.scatter(x[linked], cosine[linked], s=26, edgecolor=_PAPER, lw=0.7, zorder=3)
        dots.set_facecolor([_ACCENT] * 2)  # matplotlib 3.8 leaves the link of a lone dot of one colour out
        dots.set_urls([f"latent:{latent}" for latent in linked])
        if drawn.any():
            _log_ticks(axes.xaxis, float(x[drawn].min()), float(x[drawn].max()))
        axes.set_xlabel("fraction of tokens", color=_MUTED)
        axes.set_ylabel("encoder–decoder cosine", color=_MUTED)
        svg = _svg(figure, "map")
    caption = (
        "Each dot is a latent: frequent ones to the right, those that write what they read at the top. "
        "Coloured dots lead to their card below."
    )
    named = r'<a href="#latent-\1" aria-label="Latent \1"><title>Latent \1</title>'
    return Plot("map", "Map of latents", caption, re.sub(r'<a [^>]*href="latent:(\d+)"[^>]*>', named, svg))


def _series(metrics: list[dict[str, Any]], name: str) -> Points:
    """Return steps and values of one quantity, thinned; of a step that a resumed run logged again, the later."""
    number = (int, float)
    logged = [m for m in metrics if isinstance(m.get(name), number) and isinstance(m.get("step"), number)]
    by_step = {m["step"]: m[name] for m in logged}
    steps = np.array(sorted(by_step), dtype=np.float64)
    values = np.array([by_step[step] for step in sorted(by_step)], dtype=np.float64)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept = np.linspace(0, len(steps) - 1, _MOST_POINTS).round().astype(int)
    return steps[kept], values[kept]


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


@contextmanager
def _style() -> Iterator[None]:
    """Draw with our settings over the defaults of matplotlib, whatever the user has configured."""
    matplotlib = require("matplotlib", "report")
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**defaults, **_STYLE}):
        yield


@_style()
def _curve(name: str, lines: Mapping[str, Points], x_label: str, *, log: bool) -> str:
    """Draw curves over a common x: the last one in the accent colour, those before it behind, in grey."""
    figure, axes = _axes()
    last = list(lines)[-1]
    for label, (x, y) in lines.items():
        if log:
            x, y = x[y > 0], np.log10(y[y > 0])
        accent = label == last
        marker = "o" if len(x) <= 12 else None
        look = {"color": _ACCENT, "lw": 1.6, "zorder": 3} if accent else {"color": _MUTED, "lw": 0.9, "alpha": 0.7}
        axes.plot(x, y, marker=marker, ms=3, label=label, **look)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=_MUTED, loc="upper right", ncols=len(lines), handlelength=1.2)
    low, high = axes.get_ylim()
    if log:
        low, high = low - 0.05, high + 0.05
        _log_ticks(axes.yaxis, low, high)
        axes.set_ylim(low, high + 0.08 * (high - low))
    else:
        least = min(float(y.min()) for _, y in lines.values())
        axes.set_ylim(low if least < 0 else 0.0, high * 1.02 if high > 0 else 1.0)
        axes.yaxis.set_major_formatter(lambda value, _: _number(value))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.set_xlabel(x_label, color=_MUTED)
    return _svg(figure, name)


@_style()
def _histogram(name: str, values: Array, x_label: str, *, log: bool = False, right: float | None = None) -> str:
    """Draw a histogram with its median; `log`: the values are decimal logarithms; `right`: the axis' end."""
    figure, axes = _axes()
    if values.size:
        low, high = float(values.min()), float(values.max())
        high = high if right is None else max(high, right)
        if high - low < 0.02:
            margin = 0.5 if log else 0.05
            low, high = low - margin, high + margin
        counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
        axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.86, align="edge", color=_ACCENT, lw=0)
        axes.set_xlim(low, high)
        median = float(np.median(values))
        axes.axvline(median, color=_INK, lw=0.9, ymax=0.92, ls=(0, (2, 2)))
        side = "right" if median > (low + high) / 2 else "left"
        text = f"  median {_number(10**median if log else median)}  "
        axes.text(median, 0.98, text, ha=side, va="top", color=_INK, transform=axes.get_xaxis_transform())
        axes.set_ylim(0, counts.max() * 1.18)
        if log:
            _log_ticks(axes.xaxis, low, high)
        else:
            axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.yaxis.set_major_formatter(lambda value, _: _number(value))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_label, color=_MUTED)
    axes.set_ylabel("latents", color=_MUTED)
    return _svg(figure, name)


def _axes(size: tuple[float, float] = _SIZE) -> tuple[Any, Any]:
    """Make a figure of `size` inches with quiet axes and the same margins in all figures."""
    figure = require("matplotlib.figure", "report").Figure(figsize=size)
    width, height = size
    axes = figure.add_axes((0.56 / width, 0.43 / height, 1 - 0.66 / width, 1 - 0.51 / height))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Label an axis of decimal logarithms with what they stand for, in steps that suit its length."""
    mantissas = (1,) if high - low > 3.5 else (1, 3) if high - low > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [(d + np.log10(m), d, m) for d in decades for m in mantissas if low <= d + np.log10(m) <= high]
    axis.set_ticks([tick for tick, _, _ in ticks], [_power(d, m) for _, d, m in ticks])


def _power(decade: int, mantissa: float) -> str:
    if decade >= -3:
        return f"{mantissa * 10.0**decade:.4g}"
    power = "10" + str(decade).translate(_SUPERSCRIPT)
    return power if mantissa == 1 else f"{mantissa:g}·{power}"


def _number(value: float) -> str:
    """Write a number as on an axis: 12k, 3.5M, 0.05, 5·10⁻⁵."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size == 0 or size >= 1e-3:
        return f"{value:.3g}" if size < 1e3 else f"{value:.0f}"
    decade = int(np.floor(np.log10(size)))
    mantissa = f"{value / 10.0**decade:.2g}"
    return ("" if mantissa == "1" else f"{mantissa}·") + _power(min(decade, -4), 1)


def _svg(figure: Any, name: str) -> str:
    """Draw a figure as an `<svg>` that can stand beside others in one document; the same bytes each time."""
    stream = io.StringIO()
    with require("matplotlib", "report").rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()

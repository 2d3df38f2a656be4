"""Draw curves, histograms and dots as SVG text whose colours are CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashsae.errors import require

Array = NDArray[np.float64]
Points = tuple[Array, Array]

_INK, _MUTED, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_PAPER = "#050505"
_SERIES = [f"#0a0a{number:02x}" for number in range(1, 7)]
_MARKERS = ("o", "s", "^", "D", "v", "P")
_CSS = {
    _PAPER: "var(--paper)",
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--rule)",
    _ACCENT: "var(--accent)",
    **{stand_in: f"var(--series-{number})" for number, stand_in in enumerate(_SERIES, 1)},
}
"""Stand-ins that matplotlib draws with, and the variables of style.css that take their place."""
_SIZE = (4.5, 2.1)
MOST_DOTS = 2500
"""Dots that `dots` draws at most."""
_BINS = 48
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flashsae",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.6,
}


@contextmanager
def _style() -> Iterator[None]:
    """Draw with our settings over the defaults of matplotlib, whatever the user has configured."""
    matplotlib = require("matplotlib", "report")
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**defaults, **_STYLE}):
        yield


@_style()
def curve(name: str, lines: Mapping[str, Points], x_label: str, *, log: bool) -> str:
    """Draw curves over a common x: the last one in the accent colour, those before it behind, in grey.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        lines: label -> x and y, at least one point each, all finite.
        x_label: what x is.
        log: a logarithmic y axis, where all values are above 0.
    """
    log = log and all(bool((y > 0).all()) for _, y in lines.values())
    figure, axes = _axes()
    last = list(lines)[-1]
    for label, (x, y) in lines.items():
        y = np.log10(y) if log else y
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
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel(x_label, color=_MUTED)
    return _svg(figure, name)


@_style()
def histogram(
    name: str, values: Array, x_label: str, *, log: bool = False, left: float | None = None, right: float | None = None
) -> str:
    """Draw a histogram with its median.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        values: finite; empty axes without any.
        x_label: what the values are.
        log: the values are decimal logarithms.
        left, right: the ends of the axis, unless a value lies outside.
    """
    figure, axes = _axes()
    if values.size:
        low, high = float(values.min()), float(values.max())
        low = low if left is None else min(low, left)
        high = high if right is None else max(high, right)
        if high - low < 0.02:
            margin = 0.5 if log else 0.05
            low, high = low - margin, high + margin
        counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
        axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.86, align="edge", color=_ACCENT, lw=0)
        axes.set_xlim(low, high)
        median = float(np.median(values))
        axes.axvline(median, color=_INK, lw=0.9, ymax=0.92, ls=(0, (2, 2)))
        digits = _digits(low, high)
        side = "right" if median > (low + high) / 2 else "left"
        text = f"  median {number(10**median) if log else number(median, digits)}  "
        axes.text(median, 0.98, text, ha=side, va="top", color=_INK, transform=axes.get_xaxis_transform())
        axes.set_ylim(0, counts.max() * 1.18)
        if log:
            _log_ticks(axes.xaxis, low, high)
        else:
            axes.xaxis.set_major_formatter(lambda value, _: number(value, digits))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_label, color=_MUTED, parse_math=False)
    axes.set_ylabel("latents", color=_MUTED)
    return _svg(figure, name)


@_style()
def shares(name: str, parts: Array, row_labels: list[str], x_label: str) -> str:
    """Draw a row of cells for each of several parts of a whole, the darker the larger the part.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        parts: [rows, columns], from 0 to 1.
        row_labels: of the rows, from the top.
        x_label: what the columns are.
    """
    rows, columns = parts.shape
    longest = max(map(len, row_labels))
    figure, axes = _axes((_SIZE[0], max(_SIZE[1], 0.55 + 0.22 * rows)), left=min(1.6, 0.2 + 0.065 * longest))
    red, green, blue = (int(_ACCENT[at : at + 2], 16) / 255 for at in (1, 3, 5))
    most = float(parts.max(initial=0.0)) or 1.0
    for row in range(rows):
        colours = [(red, green, blue, round(float(part) / most, 3)) for part in parts[row]]
        axes.bar(
            range(columns), 0.92, width=1.0, bottom=rows - 1 - row, align="edge", color=colours, lw=0, antialiased=False
        )
    axes.grid(visible=False)
    axes.set_xlim(0, columns)
    axes.set_ylim(0, rows)
    axes.set_yticks([rows - 0.54 - row for row in range(rows)], row_labels, parse_math=False)
    axes.set_xticks([])
    axes.set_xlabel(x_label, color=_MUTED)
    return _svg(figure, name)


@_style()
def dots(name: str, x: Array, y: Array, links: list[int], labels: tuple[str, str]) -> str:
    """Draw a dot for each latent, some of which link to the element "latent-<number>".

    Args:
        name: unique in the document; every id in the SVG starts with it.
        x: [d_sae], above 0, drawn on a logarithmic axis; a latent with a value that is not finite has no dot.
        y: [d_sae].
        links: numbers of latents, in colour.
        labels: what x and y are.
    """
    drawn = (np.isfinite(x) & (x > 0) & np.isfinite(y)).nonzero()[0]
    some = drawn[np.linspace(0, len(drawn) - 1, min(len(drawn), MOST_DOTS)).round().astype(int)]
    linked = sorted(set(links) & set(drawn.tolist()))
    figure, axes = _axes((9.4, 2.8))
    exponent = np.log10(x, where=x > 0, out=np.zeros(len(x)))
    axes.plot(exponent[some], y[some], ls="", marker="o", ms=2.2, mew=0, color=_MUTED, alpha=0.35)
    coloured = axes.scatter(exponent[linked], y[linked], s=26, edgecolor=_PAPER, lw=0.7, zorder=3)
    coloured.set_facecolor([_ACCENT] * 2)  # matplotlib 3.8 leaves the link of a lone dot of one colour out
    coloured.set_urls([f"latent:{latent}" for latent in linked])
    if len(drawn):
        _log_ticks(axes.xaxis, float(exponent[drawn].min()), float(exponent[drawn].max()))
    axes.set_xlabel(labels[0], color=_MUTED)
    axes.set_ylabel(labels[1], color=_MUTED)
    named = r'<a href="#latent-\1" aria-label="Latent \1"><title>Latent \1</title>'
    return re.sub(r'<a [^>]*href="latent:(\d+)"[^>]*>', named, _svg(figure, name))


@_style()
def pareto(name: str, lines: Mapping[str, Points], labels: tuple[str, str]) -> str:
    """Draw a line of dots for each of several series, in colours and shapes of their own, both axes logarithmic.

    Args:
        name: unique in the document; every id in the SVG starts with it.
        lines: label -> x and y, at least one point each, all finite and above 0.
        labels: what x and y are.
    """
    figure, axes = _axes((4.5, 2.9))
    for number, (label, (x, y)) in enumerate(lines.items()):
        look = {"color": _SERIES[number % len(_SERIES)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(np.log10(x), np.log10(y), lw=1.4, ms=4.6, mec=_PAPER, mew=0.6, label=label, zorder=3, **look)
    for axis, values in ((axes.xaxis, [x for x, _ in lines.values()]), (axes.yaxis, [y for _, y in lines.values()])):
        low, high = (float(bound(np.log10(np.concatenate(values)))) for bound in (np.min, np.max))
        margin = max(0.06 * (high - low), 0.02)
        _few_ticks(axis, low - margin, high + margin)
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low - margin, high + margin)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper right", handlelength=1.6)
    axes.set_xlabel(labels[0], color=_MUTED)
    axes.set_ylabel(labels[1], color=_MUTED)
    return _svg(figure, name)


def _axes(size: tuple[float, float] = _SIZE, left: float = 0.56) -> tuple[Any, Any]:
    """Make a figure of `size` inches with quiet axes and the same margins in all figures, but for the left one."""
    figure = require("matplotlib.figure", "report").Figure(figsize=size)
    width, height = size
    axes = figure.add_axes((left / width, 0.43 / height, 1 - (left + 0.1) / width, 1 - 0.51 / height))
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


def _few_ticks(axis: Any, low: float, high: float) -> None:
    """Label an axis of decimal logarithms as `_log_ticks` does, or at equal steps where it is less than a decade."""
    if high - low > 0.8:
        _log_ticks(axis, low, high)
        return
    locator = require("matplotlib.ticker", "report").MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    ticks = [tick for tick in locator.tick_values(10**low, 10**high) if 10**low <= tick <= 10**high]
    axis.set_ticks([math.log10(tick) for tick in ticks], [f"{tick:.4g}" for tick in ticks])


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Label an axis of decimal logarithms with what they stand for, in steps that suit its length."""
    mantissas = (1,) if high - low > 3.5 else (1, 3) if high - low > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1, max(1, int((high - low) / 6)))
    ticks = [(d + np.log10(m), d, m) for d in decades for m in mantissas if low <= d + np.log10(m) <= high]
    axis.set_ticks([tick for tick, _, _ in ticks], [_power(d, m) for _, d, m in ticks])


def _power(decade: int, mantissa: float) -> str:
    if -3 <= decade < 6:
        return f"{mantissa * 10.0**decade:.4g}" if decade < 4 else f"{mantissa * 10.0**decade:,.0f}"
    power = "10" + str(decade).translate(_SUPERSCRIPT)
    return power if mantissa == 1 else f"{mantissa:g}·{power}"


def _digits(low: float, high: float) -> int:
    """Return how many digits tell the ticks of an axis apart."""
    if not low < high:
        return 3
    return min(9, max(3, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))))


def number(value: float, digits: int = 3) -> str:
    """Write a number as on an axis: 12k, 3.5M, 0.05, 5·10⁻⁵. An axis far from 0 needs more digits."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-4:
        mantissa, decade = f"{value:.1e}".split("e")
        mantissa = mantissa.removesuffix(".0")
        return ("" if mantissa == "1" else f"{mantissa}·") + "10" + str(int(decade)).translate(_SUPERSCRIPT)
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (10 if letter == "k" else 1):
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{digits}g}" if size < 1e3 else f"{value:.0f}"


def _svg(figure: Any, name: str) -> str:
    """Draw a figure as an `<svg>` that can stand beside others in one document; the same bytes each time."""
    stream = io.StringIO()
    with require("matplotlib", "report").rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser's fonts draw it, not this one
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

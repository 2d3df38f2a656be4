"""Results as they are looked up, and the parts that tables and pictures are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.passes import MASTER
from flashsae.bench.measure import OURS, Record
from flashsae.bench.peers import PYTORCH

# blue, orange and vermilion of Okabe and Ito
BLUE, ORANGE, RED, GREY, INK, GRID = "#0072B2", "#E69F00", "#D55E00", "#9A9A9A", "#222222", "#DDDDDD"
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.edgecolor": "#888888", "text.color": INK}
STYLE |= {"axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "xtick.color": INK, "ytick.color": INK}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 7, "axes.labelcolor": INK}
DPI, WIDTH = 160, 8.75  # 1400 pixels


class Results:
    """The last result of each case, by group, size, name and precision; records in the order of their measurement."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_key = {(r["group"], r["shape"]["name"], r["name"], r["precision"]): r for r in records}
        found = [self.get("ceiling", "", name, "") for name in ("copy", "gather")]
        self.ceilings: dict[str, float] = {r["name"]: r["gbs"] for r in found if r and "gbs" in r}

    def get(self, group: str, size: str, name: str, precision: str) -> Record | None:
        """Return the result of a case."""
        return self.by_key.get((group, size, name, precision))

    def row(self, group: str, name: str, precision: str) -> list[Record | None]:
        """Return the results of a case at every size of the group."""
        return [self.get(group, shape["name"], name, precision) for shape in self.sizes(group)]

    def sizes(self, group: str) -> list[Record]:
        """Return the shapes of a group, small ones before large ones."""
        shapes = {r["shape"]["name"]: r["shape"] for key, r in self.by_key.items() if key[0] == group}
        return sorted(shapes.values(), key=lambda s: (s["d_sae"], s["k"], s["d_in"]))

    def implementations(self) -> list[str]:
        """Return who was measured forward and backward: ours, dense PyTorch, the peers."""
        names = dict.fromkeys(key[2] for key in self.by_key if key[0] == "ops" and key[3] == "autocast")
        return sorted(names, key=lambda name: (name != MASTER, name != PYTORCH.name))

    def footer(self, *groups: str) -> str:
        """Say on what the results of some groups were measured, with what and when."""
        records = [record for key, record in self.by_key.items() if key[0].startswith(groups)]
        labels = {"gpu": "", "torch": "torch ", "triton": "triton ", "flashsae": "flashsae ", "commit": "commit "}
        parts = [label + ", ".join(sorted({r[key] for r in records})) for key, label in labels.items()]
        days = sorted(record["date"][:10] for record in records)
        return " · ".join([*parts, " to ".join(dict.fromkeys((days[0], days[-1])))])


def number(value: float | None, unit: str = "") -> str:
    """Write a number with three digits, "" for None."""
    return "" if value is None else (f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}") + unit


def ms_text(record: Record | None) -> str:
    """Write the median in milliseconds, or what happened instead."""
    return "" if record is None else number(record["median_ms"]) if "median_ms" in record else record["status"]


def size_text(shapes: Sequence[Record], left_out: str = "") -> str:
    """Write what sizes have: B = 4096, d_in = 2048, ..."""
    names = {"B": "batch_tokens", "d_in": "d_in", "d_sae": "d_sae", "k": "k"}
    parts = ((label, dict.fromkeys(str(s[key]) for s in shapes)) for label, key in names.items() if label != left_out)
    return ", ".join(f"{label} = {' or '.join(found)}" for label, found in parts)


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table, the first column to the left, the others to the right."""
    lines = [heads, [":--", *("--:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def matrix(sizes: list[Record], rows: dict[str, list[Record | None]], base: str, compared: Iterable[str]) -> str:
    """Return a table of milliseconds and peak memory, a row for each label; `compared` show how many times `base`."""

    def cells(label: str, column: int) -> list[str]:
        record, ours = rows[label][column], rows[base][column]
        text, peak = ms_text(record), (record or {}).get("peak_bytes")
        if label in compared and label != base and record and ours and {"median_ms"} <= record.keys() & ours.keys():
            text += f" ({record['median_ms'] / ours['median_ms']:.1f}×)"
        return [text, number(peak / 1e9) if peak else ""]

    heads = ["", *(f"{shape['name']}, {unit}" for shape in sizes for unit in ("ms", "peak GB"))]
    lines = ([label, *(text for i in range(len(sizes)) for text in cells(label, i))] for label in rows)
    return table(heads, (line for line in lines if any(line[1:])))


def draw_bars(axes: Axes, labels: list[str], records: list[Record | None]) -> None:
    """Draw horizontal bars from 0, with the milliseconds at their ends."""
    ms = [(record or {}).get("median_ms", 0.0) for record in records]
    colours = dict.fromkeys((OURS, "+ CUDA graph", "+ int8 screen"), BLUE) | {PYTORCH.name: RED}
    axes.barh(labels, ms, color=[colours.get(label, GREY) for label in labels], height=0.72)
    for i, (value, record) in enumerate(zip(ms, records)):
        axes.text(value, i, f" {ms_text(record) or 'not measured'}", va="center", fontsize=7.5)
    axes.set(xlim=(0, 1.2 * max(*ms, 1e-9)), xlabel="ms")
    axes.tick_params(axis="y", length=0, grid_alpha=0)


def log_axes(axes: Axes) -> None:
    """Give both axes a logarithmic scale with plain numbers, d_sae in thousands."""
    axes.set(xscale="log", yscale="log")
    plain = FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 16384 else f"{value:g}")
    for axis, base, at in ((axes.xaxis, 2, (1.0,)), (axes.yaxis, 10, (1.0, 2.0, 5.0))):
        axis.set(major_locator=LogLocator(base, at), minor_locator=NullLocator(), major_formatter=plain)

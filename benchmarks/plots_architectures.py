"""Tables and pictures of every architecture: steps beside TopK's, and held-out FVU against L0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from benchmarks.architectures import BASE, TIMES_TOPK
from benchmarks.drawing import BLUE, INK, ORANGE, RED, WIDTH, Results, number, size_text, table
from benchmarks.pareto import SPARSITIES, TRAININGS
from flashsae.bench.measure import OURS, Record
from flashsae.bench.peers import LIBRARIES, PYTORCH, PYTORCH_COMPILED
from flashsae.bench.stages import REST

GROUP = "architectures"
# Okabe and Ito's, then Tol's muted ones; the marker tells lines of near colours apart
COLOURS = (BLUE, ORANGE, RED, "#009E73", "#CC79A7", "#56B4E9", INK, "#882255", "#999933")
MARKERS = "osD^vP<X>"
STEPS_TEXT = """Whole steps in bf16. Ours, times a step of our TopK of the same size, which took turns with it, and the
most that we allow ourselves; L0 are the active latents of a token. Then how many times as long as ours the others take:
the dense form in PyTorch (naive autograd, or through torch.compile) and the libraries that train it, each by its own
recipe. Last the peak memory of ours, and the least of all others."""
PARETO_TEXT = """Activations of MiniLM ({d_in} wide) reading the documentation of Python: {train_tokens:,} tokens to
train on, {held_out_tokens:,} held out. d_sae {d_sae:,}, {tokens:,} tokens in batches of {batch_tokens:,}, everything
else by the defaults of the architecture. Each cell: FVU at an L0, both of the held-out tokens, in inference."""
PANELS = {
    1: "autoencoders: output of layer 2",
    2: "transcoders: MLP of layer 2, input to output",
    3: "crosscoders: outputs of layers 1, 2 and 3",
}


def steps_table(results: Results) -> str:
    """Return our step of every architecture beside TopK's, its dense form and the libraries."""
    sizes = results.sizes(GROUP)
    if not sizes:
        return ""
    others = (PYTORCH, PYTORCH_COMPILED, *LIBRARIES)
    heads = ["", "ours, ms", f"× {BASE}", "at most", "L0", *(peer.name for peer in others), "ours, GB", "others, GB"]
    parts = []
    for shape in sizes:
        rows: list[list[str]] = []
        for arch in dict.fromkeys(key[2].partition(", ")[2] for key in results.by_key if key[0] == GROUP):
            arch = arch.removeprefix("compiled, ")
            ours = results.get(GROUP, shape["name"], f"{OURS}, {arch}", "bf16")
            if ours is not None and [arch] not in [row[:1] for row in rows]:
                rows.append([arch, *_step_cells(results, shape["name"], arch, ours)])
        parts.append(f"**{shape['name']}**\n\n{table(heads, rows)}")
        parts += filter(None, [_stages(results, shape["name"], [row[0] for row in rows])])
    where = "; ".join(f"{shape['name']}: {size_text([shape])}" for shape in sizes)
    footer = results.footer(GROUP)
    return "\n\n".join([f"### Architectures\n\n{STEPS_TEXT} {where}.\n\n{footer}", *parts])


def _step_cells(results: Results, size: str, arch: str, ours: Record) -> list[str]:
    if "median_ms" not in ours:
        return [ours["status"], *[""] * (5 + len(LIBRARIES) + 2)]
    allowed = TIMES_TOPK.get(arch) or TIMES_TOPK.get(arch.partition(":")[0])
    times = ours.get(f"ratio_to_{BASE}")
    cells = [number(ours["median_ms"]), number(times, "×"), number(allowed, "×"), number(ours.get("l0"))]
    peaks = []
    for peer in (PYTORCH, PYTORCH_COMPILED, *LIBRARIES):
        record = results.get(GROUP, size, f"{peer.name}, {arch}", peer.precision)
        cells.append("" if record is None else record["status"])
        if record is not None and "median_ms" in record:
            cells[-1] = f"{record['median_ms'] / ours['median_ms']:.1f}×"
            peaks.append(record.get("peak_bytes") or 0)
    peak = ours.get("peak_bytes")
    return [*cells, number(peak / 1e9) if peak else "", number(min(peaks) / 1e9) if any(peaks) else ""]


def _stages(results: Results, size: str, archs: list[str]) -> str:
    """Return where the time of each architecture goes, a column each; "" where that is not known."""
    columns = {}
    for arch in archs:
        record = results.get(GROUP, size, f"{OURS}, {arch}", "bf16") or {}
        if stages := {stage["name"]: stage["ms"] for stage in record.get("stages", [])}:
            columns[arch] = stages
    names = dict.fromkeys(name for stages in columns.values() for name in stages if name != REST)
    rows = [[name, *(number(stages.get(name)) for stages in columns.values())] for name in (*names, REST)]
    return f"Milliseconds by stage:\n\n{table(['stage', *columns], rows)}" if columns else ""


def _last(records: Iterable[Record]) -> dict[tuple[str, int], Record]:
    """Return the last record of each architecture and sparsity, in the order of the architectures."""
    found = {(record["arch"], record["sparsity"]): record for record in records}
    places = {line.arch: place for place, line in enumerate(TRAININGS)}
    return {key: found[key] for key in sorted(found, key=lambda key: (places.get(key[0], len(places)), key[1]))}


def pareto_text(records: Sequence[Record]) -> str:
    """Return what every architecture reached."""
    last = _last(records)
    if not last:
        return ""
    rows = []
    for arch in dict.fromkeys(arch for arch, _ in last):
        found = [last.get((arch, l0)) for l0 in SPARSITIES]
        cells = [f"{r['fvu']:.4f} at {number(r['l0'])}" if r else "" for r in found]
        rows.append([f"`{arch}`", *cells, " / ".join(str(r["never_active"]) if r else "–" for r in found)])
    one = next(iter(last.values()))
    heads = ["", *(f"about {l0}" for l0 in SPARSITIES), "latents never active"]
    return f"{PARETO_TEXT.format(**one)}\n\n{table(heads, rows)}\n\n{_made_by(last.values())}"


def _made_by(records: Iterable[Record]) -> str:
    found = list(records)
    gpus, versions, commits = (", ".join(dict.fromkeys(r[key] for r in found)) for key in ("gpu", "torch", "commit"))
    return f"GPU: {gpus} · torch {versions} · commit {commits}"


def pareto_figure(records: Sequence[Record]) -> Figure | None:
    """Draw held-out FVU against L0, a panel for each kind of target."""
    last = _last(records)
    sites = {arch: len(record["sites"]) for (arch, _), record in last.items()}
    if not last:
        return None
    kinds = sorted(set(sites.values()))
    figure = Figure((WIDTH, 4.0), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=[1.6 if n == 1 else 1 for n in kinds])[0]
    for axes, kind in zip(panels, kinds):
        for i, arch in enumerate(arch for arch, n in sites.items() if n == kind):
            found = sorted((r for (name, _), r in last.items() if name == arch), key=lambda r: float(r["l0"]))
            style: Record = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
            axes.plot([r["l0"] for r in found], [r["fvu"] for r in found], label=arch, linewidth=1.5, **style)
        _log_axes(axes)
        axes.set(title=PANELS.get(kind, f"{kind} sites"), xlabel="L0 of held-out tokens")
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("FVU of held-out tokens")
    one = next(iter(last.values()))
    note = f"d_sae {one['d_sae']:,}, {one['tokens']:,} tokens · {_made_by(last.values())}"
    figure.supxlabel(note, fontsize=6.5, color="#666666")
    return figure


def _log_axes(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=(0.8 * SPARSITIES[0], 1.25 * SPARSITIES[-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(SPARSITIES), [str(l0) for l0 in SPARSITIES])
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set(major_locator=MaxNLocator(7), minor_locator=NullLocator(), major_formatter=plain)

"""Draw the measured results and write their tables: `python -m benchmarks.plots`.

Of several results of one case the last one counts. What was not measured is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from cyclopts import App
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plots_architectures, plots_runs, plots_steps
from benchmarks.choosing import choosing_text
from benchmarks.drawing import (
    BLUE,
    DPI,
    GREY,
    ORANGE,
    RED,
    STYLE,
    WIDTH,
    Results,
    draw_bars,
    log_axes,
    matrix,
    ms_text,
    number,
    size_text,
    table,
)
from benchmarks.passes import MASTER
from benchmarks.plots_inference import inference_text
from benchmarks.session import RESULTS
from benchmarks.shapes import SWEEPS
from flashsae.bench.measure import OURS, Record
from flashsae.bench.peers import PYTORCH
from flashsae.precision import Precision, has_screen

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- tables -->", "<!-- /tables -->"
OPERATIONS = {
    "gemm": "dense product alone (GEMM)",
    "encode_topk": "`encode_topk`",
    "encode_batch_topk": "`encode_batch_topk`",
    "index": "index by latent",
    "decode_loss": "`decode_loss`, with gradient of acts",
    "weight_grads": "both weight gradients, written in float32",
    "weight_grads_bf16": "both weight gradients, written in bf16",
    "weight_grads_zipf": "both weight gradients, float32, Zipf's law",
    "forward_backward": "forward + backward",
}
LINES = {
    "decode_loss": ("decode + loss + gradient of acts", BLUE, "o"),
    "weight_grads": ("both weight gradients", ORANGE, "s"),
    "dense_decode_and_grads": ("all of these as dense products", RED, "^"),
}
CEILING_TEXT = """Ceiling: of `encode_topk`, the dense product; of `decode_loss`, rows gathered from the cache; of the
weight gradients, results written at the speed of a copy, then rows gathered from the cache (the two may overlap, so
that it can be passed)."""
COUNTERS_TEXT = """Forward and backward in bf16 under Nsight Compute (`python -m benchmarks.counters`), kernels of 0.02
ms or more. Occupancy: warps resident of those possible; memory throughput: of the peak."""
app = App(name="benchmarks.plots", help=__doc__, version_flags=[])


def stage_row(record: Record, gemm: Record | None) -> list[str]:
    """Return the row of one stage."""
    if "median_ms" not in record:
        return [_stage_name(record), record["status"], "", "", "", ""]
    rate = number(record["gbs"], " GB/s") if "gbs" in record else number(record.get("tflops"), " TFLOP/s")
    gemm_ms = (gemm or {}).get("median_ms")
    ratio = record.get("ratio_to_gemm", record["median_ms"] / gemm_ms if gemm_ms else None)  # taken in turn if known
    ceiling = record.get("share_of_ceiling", 1 / record["ratio_to_gemm"] if "ratio_to_gemm" in record else None)
    share = "" if ceiling is None or has_screen(record["precision"]) else f"{ceiling:.0%}"
    spread = f"{number(record['p10_ms'])} – {number(record['p90_ms'])}"
    return [_stage_name(record), ms_text(record), spread, rate, share, number(ratio, "×")]


def _stage_name(record: Record) -> str:
    return OPERATIONS[record["name"]] + (", int8 screen" if has_screen(record["precision"]) else "")


def stage_tables(results: Results) -> str:
    """Return one table of stages for each size."""
    ceilings = ", ".join(f"{name} {number(gbs)} GB/s" for name, gbs in results.ceilings.items())
    parts = ["### Stages, weights and inputs in bf16\n", f"{CEILING_TEXT} Measured: {ceilings or 'none'}."]
    heads = ["stage", "ms", "p10 – p90", "rate", "of ceiling", "time of GEMM"]
    for shape in results.sizes("ops"):
        gemm = results.get("ops", shape["name"], "gemm", "bf16")
        cases = ((name, precision) for name in OPERATIONS for precision in ("bf16", "bf16-int8"))
        found = (results.get("ops", shape["name"], *case) for case in cases)
        rows = [stage_row(record, gemm) for record in found if record]
        parts += [f"\n**{shape['name']}**: {size_text([shape])}\n", table(heads, rows)] if rows else []
    return "\n".join(parts)


def passes_table(results: Results) -> str:
    """Return forward and backward of all implementations."""
    names = dict.fromkeys([MASTER, *results.implementations()])
    rows = {OURS if name == MASTER else name: results.row("ops", name, "autocast") for name in names}
    text = "Median (in brackets: times ours) and peak memory, that of weights, gradients and input included."
    text = f"### Forward + backward, float32 weights, products in 16 bits\n\n{text}\n\n"
    return text + matrix(results.sizes("ops"), rows, OURS, rows)


def paper_table(results: Results) -> str:
    """Return the setting of the paper, by stage."""
    cases = {OPERATIONS["gemm"] + ", float32": ("gemm", "float32")}
    cases |= {f"`encode_topk`, {name}": ("encode_topk", name) for name in get_args(Precision)}
    cases |= {OPERATIONS[name]: (name, "float32") for name in ("index", "decode_loss", "weight_grads")}
    rows = {label: results.row("paper", *case) for label, case in cases.items()}
    ours, dense = f"forward + backward, {OURS}", f"forward + backward, {PYTORCH.name}"
    rows |= {
        ours: results.row("paper", "forward_backward", "float32"),
        f"{ours}, float32-int8": results.row("paper", "forward_backward", "float32-int8"),
        dense: results.row("paper", PYTORCH.name, "float32"),
    }
    text = f"Float32 without TF32, FlashSAE certified; {size_text(results.sizes('paper'), 'd_sae')}; n is d_sae."
    return f"### The setting of the paper\n\n{text}\n\n{matrix(results.sizes('paper'), rows, ours, [dense])}"


def sweep_table(results: Results, variable: str) -> str:
    """Return the values of one sweep."""
    group, rows = f"sweep {variable}", []
    for shape in results.sizes(group):
        found = [results.get(group, shape["name"], name, "bf16") or {"status": ""} for name in LINES]
        (decode, grads, dense), rates = (r.get("median_ms") for r in found), [number(r.get("gbs")) for r in found]
        ratio = f"{dense / (decode + grads):.1f}×" if decode and grads and dense else ""
        cells = [text for record, rate in zip(found, rates) for text in (ms_text(record), rate)]
        rows.append([str(shape[variable]), *cells[:5], ratio])
    heads = [variable, "decode, ms", "GB/s", "weight gradients, ms", "GB/s", "dense, ms", "dense to ours"]
    text = f"{size_text(results.sizes(group), variable)}, bf16. Dense products do what both others do."
    return f"### Against {variable}\n\n{text}\n\n{table(heads, rows)}"


def counters_table(records: Sequence[Record]) -> str:
    """Return what the profiler read for the kernels that take longest, at each size; of several launches the mean."""
    by_kernel: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        name = "product (cuBLAS)" if record["kernel"].startswith("nvjet") else record["kernel"].removesuffix("_kernel")
        by_kernel.setdefault((record["shape"]["name"], name), []).append(record)
    heads = ["size, kernel", "ms", "occupancy", "memory throughput", "cache hits", "registers"]
    rows = []
    for (size, name), found in by_kernel.items():
        ms = sum(r["ms"] for r in found)
        mean = {key: sum(r[key] * r["ms"] for r in found) / ms for key in ("occupancy", "dram_throughput", "l2_hits")}
        if ms >= 0.02 and not name.startswith("void "):
            label = f"{size}, {name} × {len(found)}" if len(found) > 1 else f"{size}, {name}"
            registers = f"{found[0]['registers']:.0f}"
            rows.append([label, number(ms), *(f"{value:.0f}%" for value in mean.values()), registers])
    return f"### Counters of the profiler\n\n{COUNTERS_TEXT}\n\n{table(heads, rows)}"


def all_tables(results: Results) -> str:
    """Return the tables of every group that was measured."""
    parts = [results.footer("ops", "paper", "sweep")]
    parts += [stage_tables(results), passes_table(results)] if results.sizes("ops") else []
    parts += [paper_table(results)] if results.sizes("paper") else []
    parts += [sweep_table(results, variable) for variable in SWEEPS if results.sizes(f"sweep {variable}")]
    return "\n\n".join(parts)


def draw_sweep(results: Results, variable: str, above: Axes, below: Axes) -> None:
    """Draw one sweep: milliseconds above, GB/s below."""
    for name, (label, colour, marker) in LINES.items():
        found = [r for r in results.row(f"sweep {variable}", name, "bf16") if r and "median_ms" in r]
        xs = [r["shape"][variable] for r in found]
        style: Record = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6}
        above.plot(xs, [r["median_ms"] for r in found], label=label, **style)
        limits = [r["median_ms"] * r.get("share_of_ceiling", 0) for r in found]
        if all(limits) and limits:
            style |= {"marker": "", "linewidth": 1.1, "linestyle": (0, (2, 1.5))}
            above.plot(xs, limits, label=f"{label.split(' + ')[0]}, at the ceilings", **style)
        if all("gbs" in r for r in found):
            below.plot(xs, [r["gbs"] for r in found], color=colour, marker=marker, markersize=4.5)
    for name, dashes in {"copy": (0, (6, 2)), "gather": (0, (1, 1.5))}.items():
        if name in results.ceilings:
            below.axhline(results.ceilings[name], color=GREY, linewidth=1.2, linestyle=dashes, label=f"ceiling: {name}")
    title = f"against {variable}\n{size_text(results.sizes(f'sweep {variable}'), variable)}"
    log_axes(above)
    above.set(title=title)
    units = {"d_sae": "latents", "k": "active latents of a token", "d_in": "width of x"}
    below.set(ylim=(0, None), xlabel=f"{variable} ({units[variable]})")


def sweep_figure(results: Results) -> Figure | None:
    """Draw decode and weight gradients against d_sae, k and d_in."""
    if not (variables := [variable for variable in SWEEPS if results.sizes(f"sweep {variable}")]):
        return None
    figure = Figure((WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, len(variables), sharex="col", sharey="row", squeeze=False, height_ratios=(1.35, 1))
    for variable, (above, below) in zip(variables, panels.T):
        draw_sweep(results, variable, above, below)
    for axes, label in zip(panels[:, 0], ("time (ms)", "bytes moved (GB/s)")):
        axes.set_ylabel(label)
    entries = {label: handle for axes in panels[:, 0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(results.footer("sweep"), fontsize=6.5, color="#666666")
    return figure


def step_figure(results: Results) -> Figure | None:
    """Draw forward and backward: ours and the peers at S, M and L, then ours and dense in the setting of the paper."""
    sizes = [shape for shape in results.sizes("ops") if shape["name"] != "XL"]
    ops = ("ops", "autocast", results.implementations(), sizes, "16-bit products")
    paper = ("paper", "float32", ["forward_backward", PYTORCH.name], results.sizes("paper"), "float32, ours certified")
    if not (rows := [row for row in (ops, paper) if row[2] and row[3]]):
        return None
    counts = [len(row[2]) for row in rows]
    figure = Figure((WIDTH, 0.4 + sum(0.85 + 0.24 * n for n in counts)), layout="constrained")
    panels = figure.subplots(len(rows), max(len(r[3]) for r in rows), sharey="row", squeeze=False, height_ratios=counts)
    for line, (group, precision, cases, shapes, kind) in zip(panels, rows):
        labels = [OURS if name.startswith("forward_backward") else name for name in cases]
        for axes, shape in zip(line, shapes):
            draw_bars(axes, labels, [results.get(group, shape["name"], name, precision) for name in cases])
            axes.set_title(f"{shape['name']}: {kind}\n{size_text([shape])}", loc="left")
        line[0].invert_yaxis()
        for axes in line[len(shapes) :]:
            axes.set_visible(False)
    figure.supxlabel(results.footer("ops", "paper"), fontsize=6.5, color="#666666")
    return figure


def replace_tables(path: Path, text: str) -> bool:
    """Put tables between the markers of a file; tell whether it has them."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    new, found = re.subn(f"(?s){START}.*?{END}", lambda _: f"{START}\n\n{text}\n\n{END}", old, count=1)
    if found:
        path.write_text(new, encoding="utf-8")
    return bool(found)


def read(path: Path) -> list[Record]:
    """Read JSON lines; none where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


@app.default
def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Draw the pictures of docs, and write the tables of performance.md, numerics.md, architectures.md and choosing.md.

    Args:
        results: folder of JSON lines that the benchmarks have written. What is not there is left out.
        docs: folder of the pictures and pages. Tables of a page without markers are printed.
    """
    found, whole = Results(read(results / "ops.jsonl")), Results(read(results / "step.jsonl"))
    pipeline, trainer = read(results / "pipeline.jsonl"), read(results / "trainer.jsonl")
    counters = read(results / "counters.jsonl")
    archs, pareto = Results(read(results / "architectures.jsonl")), read(results / "pareto.jsonl")
    if not (found.by_key or whole.by_key or pipeline or trainer or archs.by_key or pareto):
        raise SystemExit(f"{results}: expected results of benchmarks, found none.")
    figures: dict[str, Callable[[], Figure | None]] = {
        "performance-sweep.png": lambda: sweep_figure(found),
        "performance-step.png": lambda: step_figure(found),
        "performance-whole-step.png": lambda: plots_steps.whole_figure(whole),
        "performance-scale.png": lambda: plots_steps.scale_figure(whole),
        "performance-ablation.png": lambda: plots_steps.ablation_figure(whole),
        "performance-pipeline.png": lambda: plots_runs.pipeline_figure(pipeline),
        "numerics-trainer.png": lambda: plots_runs.trainer_figure(trainer),
        "architectures.png": lambda: plots_architectures.pareto_figure(pareto),
    }
    for name, draw in figures.items():
        with rc_context(STYLE):
            if figure := draw():
                figure.savefig(docs / name, dpi=DPI)
        print(f"{docs / name}: {'drawn' if figure else 'nothing to draw'}")
    parts = [plots_steps.step_text(whole), plots_architectures.steps_table(archs), plots_runs.pipeline_text(pipeline)]
    parts += [plots_runs.reading_text(read(results / "reading.jsonl"))]
    parts += [inference_text(read(results / "inference.jsonl"))]
    parts += [all_tables(found) if found.by_key else "", counters_table(counters) if counters else ""]
    pages = {"performance.md": parts, "numerics.md": [plots_runs.trainer_text(trainer)]}
    pages["architectures.md"] = [plots_architectures.pareto_text(pareto)]
    pages["choosing.md"] = [choosing_text(read(results / "choosing.jsonl"))]
    for name, texts in pages.items():
        text = "\n\n".join(part for part in texts if part)
        print(f"{docs / name}: tables replaced" if replace_tables(docs / name, text) else text)


if __name__ == "__main__":
    app()

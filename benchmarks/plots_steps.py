"""Tables and pictures of whole training steps: the groups step, scale and ablation."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablation import RUNG_PRECISIONS
from benchmarks.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    RED,
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
from benchmarks.openai import OPENAI
from benchmarks.steps import BF16_SCREENED, DEAD_FRACTION, VARIANTS, WITH_VARIANTS
from flashsae.bench.ceilings import Ceilings
from flashsae.bench.cost import predict_stages
from flashsae.bench.measure import OURS, Record
from flashsae.bench.peers import LIBRARIES, PYTORCH, PYTORCH_COMPILED
from flashsae.bench.setups import Shape
from flashsae.bench.stages import ENCODE, REST, STAGES

WHOLE_STEPS = ("step", "scale", "ablation")
PEERS = {
    PYTORCH.name: ("bf16", RED, "^"),
    PYTORCH_COMPILED.name: ("bf16", "#882255", "v"),
    **{
        peer.name: (peer.precision, colour, marker)
        for peer, colour, marker in zip((*LIBRARIES, OPENAI), ("#CC79A7", ORANGE, "#56B4E9", INK), "Ds<P")
    },
}
PRECISE = {f"{PYTORCH.name}, {precision}": precision for precision in ("tf32", "float32")}
STAGE_COLOURS = dict(zip(STAGES, (BLUE, INK, ORANGE, RED, "#882255", "#009E73", "#8FD0B8", GREY)))
STEP_TEXT = """Forward, backward and optimiser, each library by the recipe of its own trainer, ours by `train_step`, in
bf16 or what the recipe takes. Median (in brackets: times ours) and peak memory, which counts weights, optimiser, inputs
and workspace."""
STAGE_TEXT = f"""{OURS} by stage: kernels of replayed steps under the profiler, put into stages; each stage has its
kernels' share of a step on the device, times the step as measured; everything else has the pauses too. In brackets:
share of the ceiling, which is the dense product of this size for the encode, a gather from the cache for the decode,
and a copy in the memory of the device for the latent pass."""
ABLATION_TEXT = """Whole steps in bf16; each line adds one technique to the one above. In brackets: how many times
as fast as dense PyTorch."""


def step_text(results: Results) -> str:
    """Return the tables of every group of whole steps that was measured."""
    if not any(results.sizes(group) for group in WHOLE_STEPS):
        return ""
    parts = [results.footer(*WHOLE_STEPS)]
    if results.sizes("step"):
        parts += [whole_table(results), stages_table(results, "step", STAGE_TEXT)]
        parts += [predicted_table(results), variants_table(results)]
    if results.sizes("scale"):
        parts += [scale_table(results), stages_table(results, "scale", f"{OURS} by stage, as above:")]
    if results.sizes("ablation"):
        parts.append(ablation_table(results))
    return "\n\n".join(part for part in parts if part)


def whole_table(results: Results) -> str:
    """Return whole steps of every implementation at every size."""
    rows = {OURS: results.row("step", OURS, "bf16")}
    rows[BF16_SCREENED] = results.row("step", BF16_SCREENED, "bf16-int8")
    rows |= {name: results.row("step", name, precision) for name, (precision, *_) in PEERS.items()}
    sizes = results.sizes("step")
    where = "; ".join(f"{shape['name']}: {size_text([shape])}" for shape in sizes)
    return f"### Whole training steps\n\n{STEP_TEXT} {where}.\n\n{matrix(sizes, rows, OURS, rows)}"


def stages_table(results: Results, group: str, text: str) -> str:
    """Return the milliseconds of our stages at every size of a group, with their share of the ceiling, below a text."""
    sizes, found = results.sizes(group), results.row(group, OURS, "bf16")
    by_size = [{stage["name"]: stage for stage in (record or {}).get("stages", [])} for record in found]
    rows = []
    for name in _listed(by_size):
        cells = []
        for stages in by_size:
            stage = stages.get(name, {})
            share = f" ({stage['share_of_ceiling']:.0%})" if "share_of_ceiling" in stage else ""
            cells.append(number(stage.get("ms")) + share)
        rows.append([name, *cells])
    if not rows:
        return ""
    rows.append(["whole step", *(ms_text(record) for record in found)])
    heads = ["stage", *(f"{shape['name']}, ms" for shape in sizes)]
    return f"{text}\n\n{table(heads, rows)}"


def _listed(by_size: list[dict[str, Record]]) -> list[str]:
    """Return the stages of some steps in the order in which they are listed; everything else is the last."""
    known = [name for name in STAGES if name != REST and any(name in stages for stages in by_size)]
    others = {name for stages in by_size for name in stages} - {*STAGES}
    return [*known, *sorted(others), *([REST] if any(REST in stages for stages in by_size) else [])]


def predicted_table(results: Results) -> str:
    """Return what the model of cost says of each stage, and how far that is from what was measured."""
    sizes, columns = results.sizes("step"), []
    copy, gather = ((results.get("ceiling", "", name, "") or {}).get("gbs", 0.0) for name in ("copy", "gather"))
    for shape, record in zip(sizes, results.row("step", OURS, "bf16")):
        measured = {stage["name"]: stage for stage in (record or {}).get("stages", [])}
        if not record or not measured:
            return ""
        encode = measured[ENCODE]
        gemm = encode["tflops"] / encode["share_of_ceiling"]
        predicted = predict_stages(Shape(**shape), Ceilings(copy, gather, gemm, "bf16"))
        predicted["whole step"] = sum(predicted.values())
        times = {name: stage["ms"] for name, stage in measured.items()} | {"whole step": record["median_ms"]}
        columns.append({name: f"{number(ms)} ({ms / times[name] - 1:+.0%})" for name, ms in predicted.items()})
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    text = "**Predicted** by the model of cost below from the ceilings of the same run (in brackets: off by)."
    return f"{text}\n\n{table(['stage', *(shape['name'] for shape in sizes)], rows)}"


def variants_table(results: Results) -> str:
    """Return the other ways to train at one size, and dense PyTorch in float32."""
    names = {OURS: "bf16"} | {name: variant.precision for name, variant in VARIANTS.items()} | PRECISE
    found = [(name, results.get("step", WITH_VARIANTS, name, precision)) for name, precision in names.items()]
    base, rows = (found[0][1] or {}).get("median_ms"), []
    for name, record in found:
        if record is not None:
            ms, peak = record.get("median_ms"), record.get("peak_bytes")
            ratio = number(ms / base, "×") if ms and base else ""
            spread = f"{number(record['p10_ms'])} – {number(record['p90_ms'])}" if ms else ""
            rows.append([name, ms_text(record), spread, ratio, number(peak / 1e9) if peak else ""])
    if len(rows) < 2:
        return ""
    text = f"**Ways to train at {WITH_VARIANTS}**. AuxK with {DEAD_FRACTION:.0%} of the latents dead; clipping by norm."
    return f"{text}\n\n{table(['', 'ms', 'p10 – p90', f'to {OURS}, bf16', 'peak GB'], rows)}"


def scale_table(results: Results) -> str:
    """Return whole steps against d_sae."""
    sizes, rows = results.sizes("scale"), {OURS: results.row("scale", OURS, "bf16")}
    rows |= {name: results.row("scale", name, precision) for name, (precision, *_) in PEERS.items()}
    shown = [shape | {"name": f"{shape['d_sae'] // 1024}k"} for shape in sizes]
    text = f"### Whole training steps against d_sae\n\n{size_text(sizes, 'd_sae')}."
    return f"{text}\n\n{matrix(shown, rows, OURS, rows)}"


def ablation_table(results: Results) -> str:
    """Return the rungs from dense PyTorch to our step."""
    sizes, rows = results.sizes("ablation"), []
    for name, precision in RUNG_PRECISIONS.items():
        found = results.row("ablation", name, precision)
        if not any(found):
            continue
        cells = [name]
        for record, dense in zip(found, results.row("ablation", PYTORCH.name, "bf16")):
            text, peak = ms_text(record), (record or {}).get("peak_bytes")
            if record and dense and name != PYTORCH.name and {"median_ms"} <= record.keys() & dense.keys():
                text += f" ({dense['median_ms'] / record['median_ms']:.2f}×)"
            cells += [text, number(peak / 1e9) if peak else ""]
        rows.append(cells)
    heads = ["", *(f"{shape['name']}, {unit}" for shape in sizes for unit in ("ms", "peak GB"))]
    return f"### What each technique is worth\n\n{ABLATION_TEXT}\n\n{table(heads, rows)}"


def whole_figure(results: Results) -> Figure | None:
    """Draw whole steps of every implementation, a panel each for S, M and L."""
    sizes = [shape for shape in results.sizes("step") if shape["name"] in ("S", "M", "L")]
    precisions = {OURS: "bf16"} | {name: precision for name, (precision, *_) in PEERS.items()}
    measured = [name for name, precision in precisions.items() if any(results.row("step", name, precision))]
    return _bars(results, "step", sizes, {name: precisions[name] for name in measured})


def ablation_figure(results: Results) -> Figure | None:
    """Draw the rungs from dense PyTorch to our step, a panel for each size."""
    measured = {
        name: precision for name, precision in RUNG_PRECISIONS.items() if any(results.row("ablation", name, precision))
    }
    return _bars(results, "ablation", results.sizes("ablation"), measured)


def _bars(results: Results, group: str, sizes: list[Record], precisions: dict[str, str]) -> Figure | None:
    if not sizes:
        return None
    figure = Figure((WIDTH, 1.05 + 0.24 * len(precisions)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, sizes):
        found = [results.get(group, shape["name"], name, precision) for name, precision in precisions.items()]
        draw_bars(axes, list(precisions), found)
        axes.set_title(f"{shape['name']}: whole step\n{size_text([shape])}", loc="left")
    panels[0].invert_yaxis()
    figure.supxlabel(results.footer(group), fontsize=6.5, color="#666666")
    return figure


def scale_figure(results: Results) -> Figure | None:
    """Draw against d_sae: our step by stage, the time of whole steps, and their peak memory."""
    if not (sizes := results.sizes("scale")):
        return None
    figure = Figure((WIDTH, 4.1), layout="constrained")
    stages, times, peaks = figure.subplots(1, 3)
    _draw_stages(results, stages)
    lines = {OURS: ("bf16", BLUE, "o"), **PEERS}
    for axes, key, unit in ((times, "median_ms", 1.0), (peaks, "peak_bytes", 1e9)):
        for name, (precision, colour, marker) in lines.items():
            found = [r for r in results.row("scale", name, precision) if r and r.get(key)]
            if found:
                values = [r[key] / unit for r in found]
                xs = [r["shape"]["d_sae"] for r in found]
                axes.plot(xs, values, label=name, color=colour, marker=marker, markersize=4.5, linewidth=1.6)
        log_axes(axes)
    times.set(title="whole step", xlabel="d_sae (latents)", ylabel="time (ms)")
    peaks.set(title="weights, optimiser, inputs, workspace", xlabel="d_sae (latents)", ylabel="peak memory (GB)")
    entries = {label: handle for axes in (stages, times) for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel(f"{size_text(sizes, 'd_sae')} · {results.footer('scale')}", fontsize=6.5, color="#666666")
    return figure


def _draw_stages(results: Results, axes: Axes) -> None:
    found = [r for r in results.row("scale", OURS, "bf16") if r and r.get("stages")]
    labels = [f"{r['shape']['d_sae'] // 1024}k" for r in found]
    below = [0.0] * len(found)
    by_size = [{stage["name"]: stage for stage in r["stages"]} for r in found]
    for name in _listed(by_size):
        heights = [stages.get(name, {}).get("ms", 0.0) for stages in by_size]
        axes.bar(labels, heights, bottom=below, label=name, color=STAGE_COLOURS.get(name, "#CC79A7"), width=0.72)
        below = [low + height for low, height in zip(below, heights)]
    axes.set(title=f"{OURS} by stage", xlabel="d_sae (latents)", ylabel="time (ms)")
    axes.grid(visible=False, axis="x")

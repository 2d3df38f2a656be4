"""What `flashsae bench step` does: measure our training step by stage, then whole steps beside each other, and print.

The JSON file holds what is printed: "shape", "precision", "facts" (hardware, versions, date), "ceilings" (as
`flashsae.bench.ceilings.Ceilings`), "stages" (as `flashsae.bench.stages.stage_records`) and "steps": a record of each
implementation with "name", "precision", "ratio_to_ours" where both were timed, and what
`flashsae.bench.measure.measure` says of it. With a precision that screens in 8 bits, our step without that is measured
too, in turn with it ("ratio_to_bf16", or "ratio_to_float32") and by itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flashsae.bench.ceilings import Ceilings, measure_ceilings
from flashsae.bench.measure import OURS, Record, measure_ours, measure_peer
from flashsae.bench.ours import Variant
from flashsae.bench.peers import LIBRARIES, PYTORCH
from flashsae.bench.setups import Shape, tiny
from flashsae.bench.timing import facts
from flashsae.errors import ConfigError, StorageError
from flashsae.files import atomic
from flashsae.ops.validate import Precision, check_k

FORMAT = "flashsae.bench.step"
FORMAT_VERSION = 1
HOW_STAGES = (
    "Kernels of replayed steps under the profiler, each in the stage of the operator that launched it: a stage has its "
    "kernels' share of a step on the device, times the step as it was measured; everything else has the pauses too. "
    "Ceilings, measured just before: gemm, the dense product of this size; copy, in the memory of the device; gather, "
    "of rows from its cache."
)
HOW_STEPS = (
    "Forward, backward and optimiser; median and 10th to 90th percentile of the time between two events on the device. "
    "Random data, the same initial weights. Peak: tensors alive at once, be they weights, optimiser, inputs or "
    "workspace. Timed only if the squared error is that of the dense float32 code and the loss falls."
)
NO_BENCHMARK = "These are toy sizes, to try the command: the times say nothing about speed."


def bench_step(
    shape: Shape,
    precision: Precision,
    *,
    peers: bool,
    seconds: float,
    is_tiny: bool,
    path: Path | None,
    console: Console,
) -> None:
    """Measure and print.

    Args:
        shape: the size.
        precision: of our products. Peers keep that of their own recipe.
        peers: measure other libraries, or say how to install them.
        seconds: budget of each measurement, warm-up apart.
        is_tiny: scale the size down until any device runs it at once.
        path: of the JSON file; None writes none.
        console: to print on.
    Raises:
        ConfigError: there is no CUDA device, a size is not positive, or k > d_sae.
        StorageError: the file cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not is_tiny:
        raise ConfigError(
            "bench: expected a CUDA device, found none. On a CPU the operations run as plain PyTorch, so nothing is "
            "timed there; `flashsae doctor` says what works on this machine."
        )
    _check(shape, seconds)
    if path is not None:  # before minutes of measuring
        if path.is_dir():
            raise StorageError(f"{path} is a folder; give the name of a file for the results.")
        with atomic.storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    shape = tiny(shape) if is_tiny else shape
    _print(console, _size_text(shape))
    with console.status("ceilings of the device"):
        ceilings = measure_ceilings(shape, precision, device, seconds)
    with console.status(f"{OURS}, {precision}"):
        variant = Variant(precision)
        ours = measure_ours(variant, shape, device, seconds, ceilings=ceilings, beside=variant.unscreened)
    stages = ours.pop("stages", [])
    is_timed = ours["status"] == "ok"
    why = ours.pop("stages_why", "stages are read on a GPU only" if is_timed else "our step was not timed")
    steps = [{"name": OURS, "precision": precision, **ours}]
    if variant.unscreened is not None:
        with console.status(f"{OURS}, {variant.unscreened[0]}"):
            record = measure_ours(variant.unscreened[1], shape, device, seconds)
        steps.append({"name": OURS, "precision": variant.unscreened[0], **record})
    for peer in (PYTORCH, *(LIBRARIES if peers else ())):
        with console.status(peer.name):
            record = measure_peer(peer, shape, device, seconds)
        steps.append({"name": peer.name, "precision": peer.precision, **record})
    add_ratios(steps)
    about = facts(device)
    if path is not None:
        described = {"shape": asdict(shape), "precision": precision, "tiny": is_tiny, "facts": about}
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, **described}
        result = {**head, "ceilings": asdict(ceilings), "stages": stages, "steps": steps}
        atomic.write_atomic(path, json.dumps(result, indent=2) + "\n")
    if stages:
        _print(console, stage_table(stages, ceilings), HOW_STAGES, "")
    else:
        _print(console, f"No table of stages: {why}.", "")
    _print(console, step_table(steps), *_complaints(steps), HOW_STEPS)
    _print(console, ", ".join(f"{name} {value}" for name, value in about.items()))
    if is_tiny:
        _print(console, NO_BENCHMARK)


def _print(console: Console, *parts: Table | str) -> None:
    for part in parts:
        console.print(part, highlight=False, markup=False)


def add_ratios(steps: list[Record]) -> None:
    """Add "ratio_to_ours", the time of each step over that of the first."""
    for record in steps:
        if "median_ms" in record and "median_ms" in steps[0]:
            record["ratio_to_ours"] = record["median_ms"] / steps[0]["median_ms"]


def stage_table(stages: list[Record], ceilings: Ceilings) -> Table:
    """Return the table of the stages of our step."""
    table = _table(f"{OURS} by stage", "stage", "ms", "of step", "rate", "of ceiling", "ceiling")
    units = {"tflops": "TFLOP/s", "gbs": "GB/s"}
    for stage in stages:
        unit = next((unit for unit in units if unit in stage), "")
        rate = f"{stage[unit]:,.0f} {units[unit]}" if unit else ""
        share = limit = ""
        if "ceiling" in stage:
            share = f"{stage['share_of_ceiling']:.0%}"
            limit = f"{getattr(ceilings, stage['ceiling'] + '_' + unit):,.0f} {units[unit]}, {stage['ceiling']}"
        table.add_row(stage["name"], f"{stage['ms']:.3f}", f"{stage['share_of_step']:.1%}", rate, share, limit)
    table.add_section()
    table.add_row("whole step", f"{sum(stage['ms'] for stage in stages):.3f}", "100.0%", "", "", "")
    return table


def step_table(steps: list[Record]) -> Table:
    """Return the table of whole steps."""
    table = _table("Whole training steps", "implementation", "ms", "p10 – p90", "Mtoken/s", "peak GB", "× ours")
    for record in steps:
        name = f"{record['name']}, {record['precision']}"
        if "median_ms" not in record:
            table.add_row(name, record["status"])
            continue
        peak, ratio = record["peak_bytes"], record.get("ratio_to_ours")
        table.add_row(
            name,
            f"{record['median_ms']:.3f}",
            f"{record['p10_ms']:.2f} – {record['p90_ms']:.2f}",
            f"{record['tokens_per_s'] / 1e6:.3f}",
            "" if peak is None else f"{peak / 1e9:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


def _complaints(steps: list[Record]) -> list[str]:
    return [f"{record['name']}: {record['status']}: {record['why']}" for record in steps if "why" in record]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _check(shape: Shape, seconds: float) -> None:
    for name in ("batch_tokens", "d_in", "d_sae"):
        if getattr(shape, name) < 1:
            raise ConfigError(f"{name}: expected a positive number, got {getattr(shape, name)}.")
    check_k(shape.k, shape.d_sae)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds: expected a positive number, got {seconds}.")


def _size_text(shape: Shape) -> str:
    return (
        f"{shape.batch_tokens} tokens a step, d_in = {shape.d_in}, d_sae = {shape.d_sae}, k = {shape.k}: "
        f"{2 * shape.d_sae * shape.d_in / 1e6:,.1f} million weights"
    )

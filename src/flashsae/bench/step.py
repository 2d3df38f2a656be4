"""What `flashsae bench step` does: measure our training step by stage, then whole steps beside each other, and print.

The JSON file holds what is printed: "shape", "precision", "facts" (hardware, versions, date), "ceilings" (as
`flashsae.bench.ceilings.Ceilings`), "stages" (as `flashsae.bench.stages.stage_records`) and "steps": a record of each
implementation with "name", "precision", "ratio_to_ours" where both were timed, and what
`flashsae.bench.measure.measure_step` says of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashsae import files
from flashsae.bench.ceilings import Ceilings, measure_ceilings
from flashsae.bench.measure import OURS, Record, measure_ours, measure_peer
from flashsae.bench.ours import Variant
from flashsae.bench.peers import DENSE, LIBRARIES
from flashsae.bench.problem import Shape, tiny
from flashsae.bench.timing import facts
from flashsae.errors import ConfigError
from flashsae.ops.validate import Precision, check_k

FORMAT = "flashsae.bench.step"
FORMAT_VERSION = 1
HOW_STAGES = (
    "Stages: kernels of replayed steps under the profiler, each stage's share of the time from the first kernel of a "
    "step to its last, times the measured step. Ceilings, measured just before: the dense product of this size (gemm), a "
    "copy in the memory of the device, a gather of rows from its cache."
)
HOW_STEPS = (
    "Steps: forward, backward and optimiser, median and 10th to 90th percentile of times between two events on the "
    "device, random data, same initial weights. Peak: tensors alive at once: weights, optimiser, inputs, workspace. "
    "An implementation is timed only if its squared error is that of the dense float32 code and its loss falls."
)
NO_BENCHMARK = "These are toy sizes, to try the command: the times say nothing about speed."


def bench_step(
    shape: Shape, precision: Precision, *, peers: bool, seconds: float, is_tiny: bool, console: Console
) -> dict[str, Any]:
    """Measure and print.

    Args:
        shape: the size.
        precision: of our products. Peers keep that of their own recipe.
        peers: measure other libraries, or say how to install them.
        seconds: budget of each measurement, warm-up apart.
        is_tiny: scale the size down until any device runs it at once.
        console: to print on.
    Returns:
        what the JSON file holds.
    Raises:
        ConfigError: there is no CUDA device, a size is not positive, or k > d_sae.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not is_tiny:
        raise ConfigError(
            "bench: expected a CUDA device, found none. On a CPU the operations run as plain PyTorch, so nothing is "
            "timed there; `flashsae doctor` says what works on this machine."
        )
    _check(shape, seconds)
    shape = tiny(shape) if is_tiny else shape
    console.print(_size_text(shape), highlight=False)
    with console.status("ceilings of the device"):
        ceilings = measure_ceilings(shape, precision, device, seconds)
    with console.status(f"{OURS}, {precision}"):
        ours = measure_ours(Variant(precision), shape, device, seconds, ceilings=ceilings)
    stages = ours.pop("stages", [])
    why = ours.pop("stages_why", "" if device.type == "cuda" else "stages are read on a GPU only")
    steps = [{"name": OURS, "precision": precision, **ours}]
    for peer in (DENSE, *(LIBRARIES if peers else ())):
        with console.status(peer.name):
            record = measure_peer(peer, shape, device, seconds)
        steps.append({"name": peer.name, "precision": peer.precision, **record})
    add_ratios(steps)
    about = facts(device)
    if stages:
        console.print(stage_table(stages, ceilings), "", HOW_STAGES, "", highlight=False)
    else:
        console.print(f"No table of stages: {why}.", highlight=False)
    console.print(step_table(steps), "", HOW_STEPS, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    if is_tiny:
        console.print(NO_BENCHMARK, highlight=False)
    described = {"shape": asdict(shape), "precision": precision, "facts": about, "ceilings": asdict(ceilings)}
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "tiny": is_tiny}
    return {**head, **described, "stages": stages, "steps": steps}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write what `bench_step` returned.

    Raises:
        StorageError: the file cannot be written.
    """
    files.write_atomic(path, json.dumps(result, indent=2) + "\n")


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
    table = _table(
        "Whole training steps", "implementation", "products", "ms", "p10 – p90", "tokens/s", "peak GB", "× ours", "status"
    )
    for record in steps:
        name = record["name"], record["precision"]
        if "median_ms" not in record:
            why = f": {record['why']}" if "why" in record else ""
            table.add_row(*name, "", "", "", "", "", escape(record["status"] + why))
            continue
        peak, ratio = record["peak_bytes"], record.get("ratio_to_ours")
        table.add_row(
            *name,
            f"{record['median_ms']:.3f}",
            f"{record['p10_ms']:.3f} – {record['p90_ms']:.3f}",
            f"{record['tokens_per_s']:,.0f}",
            "" if peak is None else f"{peak / 1e9:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            record["status"],
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        if heading in ("status", "products", "ceiling"):
            table.add_column(heading, overflow="fold")
        else:
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

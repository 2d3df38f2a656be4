"""Where the time of our step goes: its kernels, put into stages by the operator or part of the step that launched them.

A replayed graph does not say who launched a kernel. So one step is run as it is called, and a trace of it gives each
kernel its stage; the times are those of the same kernels in replayed steps.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.setups import Shape
from flashsae.precision import is_rounded

ENCODE = "encode + select"
INDEX = "index"
DECODE = "decode + loss + gradient"
DENSE_PRODUCTS = "decode and weight gradients, dense"
CLIP = "norm of the gradient"
PASSES = {"W_enc_T": "latent pass, encoder", "W_dec": "latent pass, decoder"}
REST = "everything else"
STAGES = (ENCODE, INDEX, DECODE, DENSE_PRODUCTS, CLIP, *PASSES.values(), REST)
"""Stages as they are listed. Those that a step does not have are left out; others stand before everything else."""

OPERATORS = {
    **dict.fromkeys(("encode_topk", "encode_batch_topk", "encode_above", "center"), ENCODE),
    **dict.fromkeys(("decode_loss", "decode"), DECODE),
    **dict.fromkeys(("latent_sums", "column_sums"), REST),
}
"""Stage of each operator of `flashsae.ops`; one that is not listed is a stage of its own."""
PARTS = {"index": INDEX, "dense products": DENSE_PRODUCTS}
"""Stage of the parts of operators that name themselves, `flashsae.profiling.part`."""

PROFILED_STEPS = 4
_PAUSE_SECONDS = 0.01  # between profiled steps, so that their kernels stand apart
_OPERATOR = "flashsae::"
_BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran: name, and begin and end in microseconds."""

    name: str
    start: float
    end: float


def stage_of(parts: Sequence[str], forward: Sequence[str], parameters: Sequence[str]) -> str:
    """Return the stage of a kernel.

    Args:
        parts: names of the operators and parts of the step that launched it, the innermost first.
        forward: the same of the operator whose backward pass launched it; none where none did.
        parameters: names, in the order in which the optimiser holds them.
    """
    for name in (*parts, *forward):
        if found := re.fullmatch(r"adam_rows (\d+)", name):
            return PASSES.get(parameters[int(found[1])], REST)
        if name == "clip_grad_norm":
            return CLIP
        if name.startswith("loss: "):
            return name
    for name in parts:
        if name in PARTS:
            return PARTS[name]
        if name.startswith(_OPERATOR):
            operator = name.removeprefix(_OPERATOR)
            return OPERATORS.get(operator, operator)
    return REST


def launched_stages(trace: Iterable[Mapping[str, Any]], parameters: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and stage of each kernel in a trace of one step, in the order in which they ran.

    Args:
        trace: events, as `torch.profiler` exports them.
        parameters: names, in the order in which the optimiser holds them.
    """
    events = [event for event in trace if event.get("ph") == "X"]
    ranges = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    kinds = {"cuda_runtime", "cuda_driver"}
    launches = {event["args"].get("correlation"): event for event in events if event.get("cat") in kinds}
    backward = [event for event in ranges if event["name"].startswith(_BACKWARD)]
    # of the operators with the number of a node of the backward pass, the last to begin is the one that made the node
    by_number = {
        event["args"]["Sequence number"]: event
        for event in sorted(ranges, key=lambda event: event["ts"])
        if "Sequence number" in event["args"] and event not in backward and not _around(event, backward)
    }
    kernels = sorted((event for event in events if _is_on_device(event)), key=lambda event: event["ts"])
    stages = []
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"))
        parts = _around(launch, ranges) if launch else []
        node = next((event for event in parts if event["name"].startswith(_BACKWARD)), None)
        origin = by_number.get(node["args"].get("Sequence number", -1)) if node else None
        forward = [origin, *_around(origin, ranges)] if origin else []
        names = [str(event["name"]) for event in parts], [str(event["name"]) for event in forward]
        stages.append((str(kernel["name"]), stage_of(*names, parameters)))
    return stages


def _is_on_device(event: Mapping[str, Any]) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _around(event: Mapping[str, Any], ranges: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the ranges of the same thread in which an event stands, the innermost first."""
    found = [
        each
        for each in ranges
        if each["tid"] == event["tid"] and each is not event
        and each["ts"] <= event["ts"] and event["ts"] + event["dur"] <= each["ts"] + each["dur"]
    ]  # fmt: skip
    return sorted(found, key=lambda each: each["dur"])


def traced_stages(run: Callable[[], object], device: torch.device, parameters: Sequence[str]) -> list[tuple[str, str]]:
    """Run one step that is no replay under the profiler; return name and stage of each of its kernels."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return launched_stages(json.loads(path.read_text())["traceEvents"], parameters)


def profiled_steps(run: Callable[[int], Any], device: torch.device) -> list[list[Kernel]]:
    """Return the kernels of some steps, each step in the order of time; nothing where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(PROFILED_STEPS):
            run(i)
            torch.cuda.synchronize(device)
            time.sleep(_PAUSE_SECONDS)
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    ]
    return split_steps(found, PROFILED_STEPS)


def split_steps(kernels: Sequence[Kernel], steps: int) -> list[list[Kernel]]:
    """Split kernels where the longest pauses are, into so many steps; nothing if there are too few kernels."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    if len(ordered) < steps:
        return []
    pauses = sorted(range(1, len(ordered)), key=lambda i: ordered[i - 1].end - ordered[i].start)[: steps - 1]
    cuts = [0, *sorted(pauses), len(ordered)]
    return [ordered[first:last] for first, last in pairwise(cuts)]


def stages_by_name(kernels: Sequence[Kernel], known: Sequence[tuple[str, str]]) -> list[str]:
    """Return the stage of each kernel of a replayed step.

    Args:
        kernels: of the step.
        known: name and stage of each kernel of the same step as it was traced. What only one of both has, such as the
            copy of a batch into a graph, is everything else; a product for which another kernel was chosen stays what
            it was.
    """
    stages = [REST] * len(kernels)
    names = [kernel.name for kernel in kernels], [name for name, _ in known]
    for tag, first, last, start, stop in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag in ("equal", "replace"):
            both = min(last - first, stop - start)
            stages[last - both : last] = [stage for _, stage in known[stop - both : stop]]
    return stages


def stage_times(
    steps: Sequence[Sequence[Kernel]], known: Sequence[tuple[str, str]], step_ms: float
) -> dict[str, float]:
    """Return the milliseconds of each stage; they add up to `step_ms`.

    Each stage has its kernels' share of the time that a step takes on the device. Pauses between kernels, and kernels
    of no stage, are everything else; but not the pause in which the device waits for the host at the start, which is
    there only because profiled steps do not follow each other.
    """
    shares: dict[str, float] = {}
    for kernels in steps:
        stages = stages_by_name(kernels, known)
        begin = next((i for i, stage in enumerate(stages) if stage != REST), 0)
        span = max(kernel.end for kernel in kernels) - kernels[begin].start
        span += sum(kernel.end - kernel.start for kernel in kernels[:begin])
        for kernel, stage in zip(kernels, stages):
            if stage != REST:
                shares[stage] = shares.get(stage, 0.0) + (kernel.end - kernel.start) / span / len(steps)
    listed = dict.fromkeys([stage for stage in STAGES if stage in shares] + sorted(shares))
    times = {stage: step_ms * shares[stage] for stage in listed}
    return times | {REST: step_ms - sum(times.values())}


def stage_records(times: dict[str, float], settings: Any, shape: Shape, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return a record of each stage: name, ms, share_of_step, and where it has one, its rate and the ceiling of that.

    A rate is "tflops" or "gbs". "ceiling" names what it stands beside, "share_of_ceiling" is its share: gemm, the dense
    product, for the encode; copy for what streams weights and moments; gather, from the cache, for decoder rows.

    Args:
        times: milliseconds of each stage.
        settings: of the training: its precision and moments.
        shape: the size.
        ceilings: of the device.
    """
    weights = float(shape.d_sae * shape.d_in)
    moment_bytes = 2 if settings.moments == "bf16" else 4
    streamed = weights * (2 * 4 + 4 * moment_bytes)  # weights and two moments, each read and written
    gathered = float(shape.batch_tokens * shape.k * shape.d_in) * (2 if is_rounded(settings.precision) else 4)
    flops = 2.0 * shape.batch_tokens * weights
    work = {
        ENCODE: ("tflops", flops / 1e9, "gemm"),
        **dict.fromkeys(PASSES.values(), ("gbs", streamed / 1e6, "copy")),
    }
    if DENSE_PRODUCTS not in times:  # else no rows are gathered
        work[DECODE] = ("gbs", gathered / 1e6, "gather")
    total, records = sum(times.values()), []
    for stage, ms in times.items():
        record: dict[str, Any] = {"name": stage, "ms": ms, "share_of_step": ms / total}
        if stage in work and ms > 0:
            unit, amount, name = work[stage]
            record[unit] = amount / ms
            if (ceiling := getattr(ceilings, f"{name}_{unit}")) is not None:
                record |= {"ceiling": name, "share_of_ceiling": amount / ms / ceiling}
        records.append(record)
    return records

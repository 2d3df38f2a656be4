"""Where the time of our step goes: the kernels of replayed steps, as the profiler saw them, put into stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.ours import OurStep
from flashsae.bench.problem import Shape

ENCODE = "encode + select"
INDEX = "index"
DECODE = "decode + loss + gradient"
DENSE = "decode and weight gradients, dense"
AUXK = "AuxK and bias gradients"
CLIP = "norm of the gradient"
PASSES = {"W_enc_T": "latent pass, encoder", "W_dec": "latent pass, decoder"}
REST = "everything else"
ORDER = (ENCODE, INDEX, DECODE, DENSE, AUXK, CLIP, *PASSES.values(), REST)
"""Stages as they are listed; those that a step does not have are left out."""

PROFILED_STEPS = 4
_PAUSE_SECONDS = 0.01  # between profiled steps, so that their kernels stand apart
_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas")


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran: name, and begin and end in microseconds."""

    name: str
    start: float
    end: float


def stages_of(names: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """Return the stage of each kernel of a step.

    Args:
        names: of kernels in the order in which they ran.
        parameters: of the optimiser, in the order in which it changes them.
    """
    stages = [REST] * len(names)

    def find(words: Sequence[str], start: int, stop: int) -> list[int]:
        return [i for i in range(start, stop) if any(word in names[i] for word in words)]

    passes = find(("adam_rows_kernel",), 0, len(names))
    end = passes[0] if passes else len(names)
    indexed = next(iter(find(("searchsorted",), 0, end)), -1)  # ends the index, which is built once
    selected = max(find(("encode_topk",), 0, indexed), default=-1)
    if selected >= 0:
        begin = find(("encode_topk", *_PRODUCTS), 0, indexed)[0]
        stages[begin : selected + 1] = [ENCODE] * (selected + 1 - begin)
        stages[selected + 1 : indexed + 1] = [INDEX] * (indexed - selected)
    auxk = next(iter(find(("encode_topk_group_max", "encode_topk_select"), indexed + 1, end)), end)
    decode = find(("decode_sparse",), indexed + 1, auxk)
    for i in decode:
        stages[i] = DECODE
    if not decode:  # the code is so dense that products are faster
        for i in find(_PRODUCTS, indexed + 1, auxk):
            stages[i] = DENSE
    if auxk < end:
        first = (decode[-1] if decode else indexed) + 1
        stages[first:end] = [AUXK] * (end - first)
    consumers = sorted([*passes, *find(("row_squares_kernel",), 0, len(names))])
    for i in consumers:
        name = parameters[passes.index(i)] if i in passes and passes.index(i) < len(parameters) else ""
        stages[i] = CLIP if i not in passes else PASSES.get(name, REST)
        if i and "latent_rows_partial_kernel" in names[i - 1]:  # sums pieces of long lists for the pass behind it
            stages[i - 1] = stages[i]
    return stages


def profiled_steps(run: Callable[[int], Any], device: torch.device) -> list[list[Kernel]]:
    """Return the kernels of some steps, each step in the order of time; nothing where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

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


def stage_times(steps: Sequence[Sequence[Kernel]], parameters: Sequence[str], step_ms: float) -> dict[str, float]:
    """Return the milliseconds of each stage; they add up to `step_ms`.

    Each stage has its kernels' share of the time that a step takes on the device. Pauses between kernels, and kernels
    of no stage, are everything else; but not the pause in which the device waits for the host at the start, which is
    there only because profiled steps do not follow each other.
    """
    shares: dict[str, float] = {}
    for kernels in steps:
        stages = stages_of([kernel.name for kernel in kernels], parameters)
        begin = next((i for i, stage in enumerate(stages) if stage != REST), 0)
        span = max(kernel.end for kernel in kernels) - kernels[begin].start
        span += sum(kernel.end - kernel.start for kernel in kernels[:begin])
        for kernel, stage in zip(kernels, stages):
            if stage != REST:
                shares[stage] = shares.get(stage, 0.0) + (kernel.end - kernel.start) / span / len(steps)
    times = {stage: step_ms * shares[stage] for stage in ORDER if stage in shares}
    return times | {REST: step_ms - sum(times.values())}


def stage_records(times: dict[str, float], step: OurStep, shape: Shape, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return a record of each stage: name, ms, share_of_step, and where it has one, its rate and the ceiling of that.

    A rate is "tflops" or "gbs". "ceiling" names what it stands beside, "share_of_ceiling" is its share: gemm, the dense
    product, for the encode; copy for what streams weights and moments; gather, from the cache, for decoder rows.
    """
    weights = float(shape.d_sae * shape.d_in)
    moment_bytes = 2 if step.config.moments == "bf16" else 4
    streamed = weights * (2 * 4 + 4 * moment_bytes)  # weights and two moments, each read and written
    gathered = float(shape.batch_tokens * shape.k * shape.d_in) * (2 if step.config.precision == "bf16" else 4)
    flops = 2.0 * shape.batch_tokens * weights
    work = {
        ENCODE: ("tflops", flops / 1e9, "gemm"),
        DECODE: ("gbs", gathered / 1e6, "gather"),
        **dict.fromkeys(PASSES.values(), ("gbs", streamed / 1e6, "copy")),
    }
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


def parameter_order(step: OurStep) -> list[str]:
    """Return the names of parameters in the order in which the optimiser changes them."""
    names = {id(parameter): name for name, parameter in step.state.sae.named_parameters()}
    return [names[id(parameter)] for group in step.state.optimizer.param_groups for parameter in group["params"]]

"""Measure whole training steps: built, checked against the dense float32 code, and timed only if they agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.ours import OurStep, Variant, build_ours
from flashsae.bench.peers import Peer
from flashsae.bench.problem import Problem, Shape, dense_squared_error, make_problem
from flashsae.bench.stages import parameter_order, profiled_steps, stage_records, stage_times
from flashsae.bench.timing import free, time_runs
from flashsae.errors import MissingExtraError

Record = dict[str, Any]
OURS = "FlashSAE"
UPDATES = 3  # of the same batch, after which its loss must have fallen
# half a unit in the last place of what is stored, several times over; of the sum of squared errors
TOLERANCE = {"bf16": 2.0**-5, "fp16": 2.0**-5, "tf32": 2.0**-8, "float32": 2.0**-12}


class WholeStep(Protocol):
    """A training step of some implementation, as `flashsae.bench.dense.Step` and `flashsae.bench.ours.OurStep` are."""

    @property
    def squared_error(self) -> Callable[[float, Tensor], float]:
        """From what `run` returns, and x, to the sum of squared errors."""

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which it is to run."""

    def run(self, x: Tensor) -> Tensor:
        """Do a whole step; return the loss before it."""


def check_step(step: WholeStep, x: Tensor, expected: float, precision: str) -> str:
    """Do the first steps, all on one batch; return what is wrong with them, "" if nothing.

    Args:
        step: fresh.
        x: [B, d_in].
        expected: sum of squared errors before the first step, by the dense float32 code.
        precision: of its products, for the tolerance.
    """
    first = float(step.run(x))
    got, wrong = step.squared_error(first, x), ""
    if not abs(got - expected) <= TOLERANCE[precision] * expected:
        wrong = f"squared error: expected about {expected:.6g}, got {got:.6g}. "
    if isinstance(step, OurStep):
        wrong += step.wrong_after_first()
    for _ in range(UPDATES - 1):
        step.run(x)
    last = float(step.run(x))
    if not (last < first and math.isfinite(last)):
        wrong += f"loss: expected less than {first:.6g} after {UPDATES} updates on one batch, got {last:.6g}. "
    return wrong


def measure_step(
    build: Callable[[Problem], WholeStep],
    shape: Shape,
    precision: str,
    device: torch.device,
    seconds: float,
    *,
    dead: int = 0,
    more: Callable[[WholeStep, Record, tuple[Tensor, ...]], Record] | None = None,
) -> Record:
    """Build one implementation, check it, time it, and let it go.

    Args:
        build: from the weights that all start from; may not change them.
        shape: the size.
        precision: of its products, for the tolerance.
        device: where.
        seconds: budget of the timing, warm-up apart.
        dead: latents that never fire.
        more: further figures, from the step, its record and the inputs.
    Returns:
        a record with "status": "ok", "wrong result", "not installed", "out of memory" or "failed"; with "why" behind
        those that have a reason; and if ok, "median_ms", "p10_ms", "p90_ms", "iterations", "tokens_per_s",
        "peak_bytes" (most bytes of tensors at once: weights, optimiser, inputs and workspace, graphs included) and
        "reserved_bytes" (what the allocator held at most), both None on a CPU.
    """
    free(device)
    record: Record = {}
    try:
        with torch.autograd.set_multithreading_enabled(False):  # handing over to a thread costs the host more
            record = _measured(build, shape, precision, device, seconds, dead, more)
    except torch.OutOfMemoryError:
        record = {"status": "out of memory"}
    except MissingExtraError as error:
        record = {"status": "not installed", "why": str(error)}
    except Exception as error:  # a peer may fail in any way; the others are measured all the same
        record = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
    free(device)
    return record


def _measured(
    build: Callable[[Problem], WholeStep],
    shape: Shape,
    precision: str,
    device: torch.device,
    seconds: float,
    dead: int,
    more: Callable[[WholeStep, Record, tuple[Tensor, ...]], Record] | None,
) -> Record:
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    problem = make_problem(shape, torch.float32, device, tied=True, dead=dead)
    xs, expected = problem.xs, dense_squared_error(problem)
    step = build(problem)
    with step.settings():
        del problem  # its weights are no part of the step
        free(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        wrong = check_step(step, xs[0], expected, precision)
        if wrong:
            return {"status": "wrong result", "why": wrong.strip()}
        (timing,) = time_runs([lambda i: step.run(xs[i % len(xs)])], device, seconds)
        record: Record = {"status": "ok", **asdict(timing)}
        record["tokens_per_s"] = 1e3 * shape.batch_tokens / timing.median_ms
        record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before if cuda else None
        record["reserved_bytes"] = torch.cuda.max_memory_reserved(device) if cuda else None
        return record | (more(step, record, xs) if more else {})


def measure_ours(
    variant: Variant,
    shape: Shape,
    device: torch.device,
    seconds: float,
    *,
    dead: int = 0,
    ceilings: Ceilings | None = None,
) -> Record:
    """Measure our step; with `ceilings`, and on a GPU, its record has "stages": see `stages.stage_records`."""

    def stages(step: WholeStep, record: Record, xs: tuple[Tensor, ...]) -> Record:
        assert isinstance(step, OurStep)
        if ceilings is None or device.type != "cuda":
            return {}
        try:
            steps = profiled_steps(lambda i: step.run(xs[i % len(xs)]), device)
        except RuntimeError as error:  # the step itself was timed
            return {"stages": [], "stages_why": f"the profiler failed: {error}"[:200]}
        if not steps:
            return {"stages": [], "stages_why": "the profiler saw no kernels"}
        times = stage_times(steps, parameter_order(step), record["median_ms"])
        return {"stages": stage_records(times, step, shape, ceilings)}

    def build(problem: Problem) -> WholeStep:
        return build_ours(problem, variant)

    return measure_step(build, shape, variant.precision, device, seconds, dead=dead, more=stages)


def measure_peer(peer: Peer, shape: Shape, device: torch.device, seconds: float) -> Record:
    """Measure another implementation, if it is installed."""
    if not peer.is_installed:
        return {"status": "not installed", "why": peer.install}
    return measure_step(peer.build, shape, peer.precision, device, seconds)

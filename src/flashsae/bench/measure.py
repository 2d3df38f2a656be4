"""The harness: what is measured is built, checked, timed only if it is right, and let go again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.dense import dense_pytorch
from flashsae.bench.ours import OurStep, Variant, build_ours
from flashsae.bench.peers import Peer
from flashsae.bench.problem import Problem, dense_squared_error, make_problem
from flashsae.bench.setups import JUMPS, Shape, base_name
from flashsae.bench.stages import profiled_steps, stage_records, stage_times, traced_stages
from flashsae.bench.timing import captured, free, peak_bytes, time_runs
from flashsae.errors import MissingExtraError
from flashsae.precision import Precision, operand_of

Record = dict[str, Any]
OURS = "FlashSAE"
UPDATES = 3  # of the same batch, after which its loss must have fallen
FEW_TOKENS = 2048  # of a check that does dense float32 steps
RISE = 0.1  # of the loss where thresholds move at the rate of a library, which updates on one batch overshoot with
LIKE = 0.5  # of a small change: half of what precisions make of it
# half a unit in the last place of what a precision stores, twice over: of the inputs and of the result
_OF_OPERANDS = {"bf16": 2.0**-7, "fp16": 2.0**-7, "tf32": 2.0**-10, "float32": 2e-5}
TOLERANCE = {name: _OF_OPERANDS[operand_of(name)] for name in (*_OF_OPERANDS, *get_args(Precision))}
OF_SQUARES = 4  # times that for a sum of squared errors, relative to the sum


@dataclass(frozen=True)
class Subject:
    """What is measured, ready to run.

    Args:
        run: does it once; takes the number of the iteration, to take turns among inputs.
        check: returns what is wrong with the result, "" if nothing; None where there is nothing of ours to check.
        held: tensors that count as its memory though they exist before it runs: weights and input. None: all that was
            allocated since it began to be built counts.
        figures: from the record so far to further figures of it.
        settings: the context in which it is to be checked and run.
        capturable: whether it can run as a CUDA graph. Then the time is that of replays, so of the GPU alone.
        reference: name and run of what takes turns with it, so that both see the same clocks and temperature.
        beside: the same, but made only when its own memory is known, and timed with it once more.
    """

    run: Callable[[int], Any]
    check: Callable[[], str] | None = None
    held: tuple[Tensor, ...] | None = ()
    figures: Callable[[Record], Record] = field(default=lambda record: {})
    settings: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    capturable: bool = False
    reference: tuple[str, Callable[[int], Any]] | None = None
    beside: tuple[str, Callable[[], Callable[[int], Any]]] | None = None


def measure(build: Callable[[], Subject], device: torch.device, seconds: float) -> Record:
    """Build, check and time one subject, and let it go.

    Args:
        build: makes it ready.
        device: where.
        seconds: budget of the timing, warm-up apart.
    Returns:
        a record with "status": "ok" ("ok, unchecked" without a check), "wrong result", "not installed", "out of memory"
        or "failed"; with "why" behind those that have a reason; and if ok, "median_ms", "p10_ms", "p90_ms",
        "iterations", "peak_bytes" (most bytes of tensors at once), "reserved_bytes" (what the allocator held at most),
        both None on a CPU, and the figures of the subject.
    """
    free(device)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # handing over to a thread costs the host more
            record = _measured(build, device, seconds)
    except torch.OutOfMemoryError:
        record = {"status": "out of memory"}
    except MissingExtraError as error:
        record = {"status": "not installed", "why": str(error)}
    except Exception as error:  # a peer may fail in any way; the others are measured all the same
        record = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
    free(device)
    return record


def _measured(build: Callable[[], Subject], device: torch.device, seconds: float) -> Record:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    subject = build()
    free(device)  # what it was built from
    with subject.settings():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wrong = subject.check() if subject.check else ""
        if wrong:
            return {"status": "wrong result", "why": wrong.strip()}
        runs = [subject.run, *([subject.reference[1]] if subject.reference else [])]
        timed, *beside = time_runs(runs, device, seconds)
        record: Record = {"status": "ok" if subject.check else "ok, unchecked"}
        if subject.capturable and device.type == "cuda":
            record["eager_ms"] = timed.median_ms
            timed, *beside = time_runs([captured(run) for run in runs], device, seconds)
        record |= asdict(timed) | _memory(subject, device, before)
        if subject.reference:
            name = subject.reference[0]
            record[f"{name}_ms"] = beside[0].median_ms
            record[f"ratio_to_{name}"] = timed.median_ms / beside[0].median_ms
        return record | _beside(subject, device, seconds) | subject.figures(record)


def _beside(subject: Subject, device: torch.device, seconds: float) -> Record:
    """Time what takes turns with a subject; nothing where there is no room for both."""
    if not subject.beside:
        return {}
    name, make = subject.beside
    try:
        timed, other = time_runs([subject.run, make()], device, seconds)
    except torch.OutOfMemoryError:
        return {}
    finally:
        free(device)
    return {f"{name}_ms": other.median_ms, f"ratio_to_{name}": timed.median_ms / other.median_ms}


def _memory(subject: Subject, device: torch.device, before: int) -> Record:
    if device.type != "cuda":
        return {"peak_bytes": None, "reserved_bytes": None}
    reserved = torch.cuda.max_memory_reserved(device)
    if subject.held is None:
        return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before, "reserved_bytes": reserved}
    return {"peak_bytes": peak_bytes(subject.run, device, subject.held), "reserved_bytes": reserved}


class WholeStep(Protocol):
    """A training step of some implementation, as `dense.AutogradStep` and `ours.OurStep` are."""

    @property
    def squared_error(self) -> Callable[[float, Tensor], float]:
        """From what `run` returns, and x, to the sum of squared errors."""

    @property
    def lr(self) -> float | None:
        """Learning rate of Adam; None where it is not known."""

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which it is to run."""

    def run(self, x: Tensor) -> Tensor:
        """Do a whole step; return the loss before it."""


def check_step(
    step: WholeStep, x: Tensor, expected: float, precision: str, change: float | None = None, rise: float = 0.0
) -> str:
    """Do the first steps, all on one batch; return what is wrong with them, "" if nothing.

    Args:
        step: fresh.
        x: [B, d_in].
        expected: sum of squared errors before the first step, by the dense float32 code.
        precision: of its products, for the tolerance.
        change: what the updates change of this sum; None where all that is known is that the loss falls.
        rise: by this fraction of itself the loss may rise instead, if it changes at all.
    """
    first = float(step.run(x))
    got, wrong = step.squared_error(first, x), ""
    if not abs(got - expected) <= OF_SQUARES * TOLERANCE[precision] * expected:
        wrong = f"squared error: expected about {expected:.6g}, got {got:.6g}. "
    if isinstance(step, OurStep):
        wrong += step.wrong_after_first()
    for _ in range(UPDATES - 1):
        step.run(x)
    last = float(step.run(x))
    if change is not None:
        changed = step.squared_error(last, x) - got
        noise = TOLERANCE[precision] * expected / len(x) ** 0.5  # what tokens round off adds up to as a random walk
        if not abs(changed - change) <= LIKE * abs(change) + noise:
            wrong += f"squared error: expected {UPDATES} updates to change it by {change:.3g}, got {changed:.3g}. "
    elif not (last < first * (1 + rise) and last != first and math.isfinite(last)):
        wrong += (
            f"loss: expected less than {first * (1 + rise):.6g} after {UPDATES} updates on one batch, got {last:.6g}. "
        )
    return wrong


def expected_change(problem: Problem, lr: float) -> float:
    """Return what updates by the dense float32 code change of the sum of squared errors of the first input."""
    step, x = dense_pytorch(problem, "float32", lr=lr), problem.xs[0]
    with step.settings():
        errors = [step.squared_error(float(step.run(x)), x) for _ in range(UPDATES + 1)]
    return errors[-1] - errors[0]


@dataclass(frozen=True)
class StepCase:
    """A whole training step to measure.

    Args:
        precision: of its products, for the tolerance.
        build: from the weights that all start from; may not change them.
        arch: its architecture, by name or as settings.
        dead: latents that are never active.
        ceilings: measured on the device; with these, and on a GPU, the record of ours has "stages".
        beside: a name, and another way of ours to train, whose step takes turns with it.
    """

    precision: str
    build: Callable[[Problem], WholeStep]
    arch: object = "topk"
    dead: int = 0
    ceilings: Ceilings | None = None
    beside: tuple[str, Variant] | None = None

    def subject(self, shape: Shape, device: torch.device) -> Subject:
        """Make the step of one size ready; all that it allocates counts as its memory, graphs and inputs included."""
        problem = make_problem(shape, torch.float32, device, tied=True, dead=self.dead, arch=self.arch)
        xs, step, checked, change = problem.xs, self.build(problem), problem.xs[0], None
        jumps = base_name(problem.arch_name) in JUMPS
        if step.lr is not None and jumps:
            checked = checked[:FEW_TOKENS]
            problem = replace(problem, xs=(checked,))
            change = expected_change(problem, step.lr)
        expected = dense_squared_error(problem, "ieee" if operand_of(self.precision) == "float32" else "tf32")

        def run(i: int) -> Tensor:
            return step.run(xs[i % len(xs)])

        def figures(record: Record) -> Record:
            rate: Record = {"tokens_per_s": 1e3 * shape.batch_tokens / record["median_ms"]}
            if isinstance(step, OurStep):
                rate["l0"] = step.active(xs[0])
            if not isinstance(step, OurStep) or self.ceilings is None or device.type != "cuda":
                return rate
            times = _stage_times(step, xs, record["median_ms"])
            if isinstance(times, str):
                return rate | {"stages": [], "stages_why": times}
            return rate | {"stages": stage_records(times, step.config, shape, self.ceilings)}

        def check() -> str:
            rise = RISE if step.lr is None and jumps else 0.0  # the problem is not kept: its weights would be memory
            return check_step(step, checked, expected, self.precision, change, rise)

        beside = None
        if self.beside is not None:
            beside = self.beside[0], partial(_turns, self.beside[1], shape, device)
        return Subject(run, check, None, figures, step.settings, beside=beside)


def _turns(variant: Variant, shape: Shape, device: torch.device) -> Callable[[int], Tensor]:
    """Return a step of ours that takes turns with another."""
    problem = make_problem(shape, torch.float32, device, tied=True, arch=variant.arch)
    xs, step = problem.xs, build_ours(problem, variant)
    return lambda i: step.run(xs[i % len(xs)])


def _stage_times(step: OurStep, xs: tuple[Tensor, ...], step_ms: float) -> dict[str, float] | str:
    """Return the milliseconds of each stage of our step, or why they are not known."""
    device = xs[0].device
    try:
        steps = profiled_steps(lambda i: step.run(xs[i % len(xs)]), device)
        known = traced_stages(lambda: step.uncaptured().run(xs[0]), device, step.parameters())
    except RuntimeError as error:  # the step itself was timed
        return f"the profiler failed: {error}"[:200]
    return stage_times(steps, known, step_ms) if steps else "the profiler saw no kernels"


def measure_ours(
    variant: Variant,
    shape: Shape,
    device: torch.device,
    seconds: float,
    *,
    dead: int = 0,
    ceilings: Ceilings | None = None,
    beside: tuple[str, Variant] | None = None,
) -> Record:
    """Measure our step; with `ceilings`, and on a GPU, its record has "stages": see `stages.stage_records`.

    With `beside`, a name and another way to train, it has "<name>_ms" and "ratio_to_<name>" of a step that takes turns.
    """

    def build(problem: Problem) -> OurStep:
        return build_ours(problem, variant)

    case = StepCase(variant.precision, build, variant.arch, dead, ceilings, beside)
    return measure(lambda: case.subject(shape, device), device, seconds)


def measure_peer(peer: Peer, shape: Shape, device: torch.device, seconds: float, arch: str = "topk") -> Record:
    """Measure another implementation of an architecture, if it is installed."""
    if not peer.is_installed:
        return {"status": "not installed", "why": peer.install}
    return measure(lambda: StepCase(peer.precision, peer.build, arch).subject(shape, device), device, seconds)

"""Time a function on a device, take its peak memory, and say on what it was measured."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

AT_LEAST, AT_MOST, SLOW_SECONDS = 5, 50, 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the iterations of one measurement: median, 10th and 90th percentile, and how many."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    iterations: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Summarise the milliseconds of some iterations."""
        points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64, device="cpu")
        median, p10, p90 = torch.tensor(times_ms, dtype=torch.float64, device="cpu").quantile(points).tolist()
        return cls(median, p10, p90, len(times_ms))


def time_runs(runs: Sequence[Callable[[int], Any]], device: torch.device, seconds: float) -> list[Timing]:
    """Repeat `runs`, in turn, until `seconds` or 50 iterations, at least 5 (3 of slow ones), after a warm-up.

    On a GPU every iteration stands between two events and all of them are queued before the host waits, so the host's
    own time counts only where the GPU would have to wait for it.

    Args:
        runs: each takes the number of the iteration, to take turns among inputs.
        device: where they run.
        seconds: budget of each, warm-up apart.
    """

    def run_all(i: int) -> None:
        for run in runs:
            run(i)

    run_all(0)  # compiles and tunes
    start = _now(device)
    run_all(1)
    once = (_now(device) - start) / len(runs)
    slow = once > SLOW_SECONDS
    for i in range(0 if slow else 2):
        run_all(i)
    iterations = max(3 if slow else AT_LEAST, min(AT_MOST, int(seconds / once)))
    timed = _times_by_events if device.type == "cuda" else _times_by_clock
    return [Timing.of(times) for times in timed(runs, device, iterations)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _times_by_events(runs: Sequence[Callable[[int], Any]], device: torch.device, iterations: int) -> list[list[float]]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * iterations)] for _ in runs]  # type: ignore[no-untyped-call]
    for i in range(iterations):
        for run, marks in zip(runs, events):
            marks[2 * i].record()
            run(i)
            marks[2 * i + 1].record()
    torch.cuda.synchronize(device)
    return [[first.elapsed_time(last) for first, last in zip(marks[::2], marks[1::2])] for marks in events]


def _times_by_clock(runs: Sequence[Callable[[int], Any]], device: torch.device, iterations: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in runs]
    for i in range(iterations):
        for run, ms in zip(runs, times):
            start = _now(device)
            run(i)
            ms.append(1e3 * (_now(device) - start))
    return times


def captured(run: Callable[[int], Any]) -> Callable[[int], None]:
    """Return a function that replays `run(0)` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run(0)
    return lambda i: graph.replay()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def free(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(run: Callable[[int], Any], device: torch.device, held: tuple[Tensor, ...]) -> int | None:
    """Return the most bytes allocated while `run` runs once, those of `held` included and of nothing else before it.

    None on a CPU, where nobody counts.
    """
    if device.type != "cuda":
        return None
    for tensor in held:
        tensor.grad = None  # those of the last iteration would count as there before
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + tensor_bytes(held)


@contextmanager
def float32_products(kind: str | None) -> Iterator[None]:
    """Have float32 matrix products on a GPU use "tf32" or "ieee" arithmetic; then put the user's setting back.

    Args:
        kind: None changes nothing.
    """
    if kind is None or not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised where only the newer setting was used
        older = "highest"
    try:
        torch.set_float32_matmul_precision({"tf32": "high", "ieee": "highest"}[kind])  # sets both settings alike
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        matmul.fp32_precision = before


def facts(device: torch.device) -> dict[str, str]:
    """Return the hardware, the versions and the date that belong to every result."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed as a package"

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
    versions = {name: version(name) for name in ("triton", "flashsae")}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": gpu, "torch": torch.__version__, **versions, "date": date}

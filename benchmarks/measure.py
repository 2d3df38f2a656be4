"""Time a function, take its peak memory, and keep the result as one JSON line."""

from __future__ import annotations

import datetime
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.shapes import Shape

AT_LEAST, AT_MOST, SLOW_SECONDS = 5, 50, 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the iterations of one measurement: median, 10th and 90th percentile, and how many."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    iterations: int


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        name: as it stands in results.
        run: does it once; takes the number of the iteration, to take turns among inputs.
        check: returns what is wrong with the result, "" if nothing; None where there is nothing of ours to check.
        held: tensors that count as its memory though they exist before it runs: weights and input.
        figures: from the median in milliseconds to further figures of the result.
        capturable: whether it can run as a CUDA graph. Then the time is that of replays, so of the GPU alone.
        reference: what takes turns with it, so that both see the same clocks and temperature; for the ratio.
    """

    name: str
    run: Callable[[int], Any]
    check: Callable[[], str] | None = None
    held: tuple[Tensor, ...] = ()
    figures: Callable[[float], dict[str, Any]] = field(default=lambda ms: {})
    capturable: bool = False
    reference: Case | None = None


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def free(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_runs(runs: Sequence[Callable[[int], Any]], device: torch.device, seconds: float) -> list[Timing]:
    """Repeat `runs`, in turn, until `seconds` or 50 iterations, at least 5 (3 of slow ones), after a warm-up.

    On a GPU every iteration stands between two events and all of them are queued before the host waits, so the host's
    own time counts only where the GPU would have to wait for it.
    """
    cuda = device.type == "cuda"

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def run_all(i: int) -> None:
        for run in runs:
            run(i)

    run_all(0)  # compiles and tunes
    start = wait()
    run_all(1)
    once = (wait() - start) / len(runs)
    slow = once > SLOW_SECONDS
    for i in range(0 if slow else 2):
        run_all(i)
    iterations = max(3 if slow else AT_LEAST, min(AT_MOST, int(seconds / once)))
    times: list[list[float]] = [[] for _ in runs]
    if cuda:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * iterations)] for _ in runs]
        for i in range(iterations):
            for run, marks in zip(runs, events):
                marks[2 * i].record()
                run(i)
                marks[2 * i + 1].record()
        wait()
        times = [[first.elapsed_time(last) for first, last in zip(marks[::2], marks[1::2])] for marks in events]
    else:
        for i in range(iterations):
            for run, ms in zip(runs, times):
                start = wait()
                run(i)
                ms.append(1e3 * (wait() - start))
    spread = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64), dim=1
    )
    return [Timing(*three, iterations) for three in spread.T.tolist()]


def captured(run: Callable[[int], Any]) -> Callable[[int], None]:
    """Return a function that replays `run(0)` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run(0)
    return lambda i: graph.replay()


def peak_bytes(run: Callable[[int], Any], device: torch.device, held: tuple[Tensor, ...]) -> int | None:
    """Return the most bytes allocated while `run` runs once, those of `held` included and of nothing else before it."""
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


def facts(device: torch.device) -> dict[str, str]:
    """Return the hardware, the versions, the commit (GIT_COMMIT, else git) and the date that belong to every result."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed as a package"

    commit = os.environ.get("GIT_COMMIT", "")
    if not commit:
        try:
            command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            folder = Path(__file__).parent
            commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
    versions = {name: version(name) for name in ("triton", "flashsae")}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": gpu, "torch": torch.__version__, **versions, "commit": commit, "date": date}


class Session:
    """Measures cases one after another, appends each result to a file, and prints them all at the end.

    Args:
        device: where to measure.
        seconds: budget of one measurement, warm-up apart.
        only: measure cases with this text in their name; "" for all.
        out: JSON lines file to append to.
    """

    def __init__(self, device: torch.device, seconds: float, only: str, out: Path) -> None:
        self.device, self.seconds, self.only, self.out = device, seconds, only, out
        self.facts = facts(device)
        self.records: list[dict[str, Any]] = []
        self.medians: dict[tuple[str, str], float] = {}
        self.console = Console()
        out.parent.mkdir(parents=True, exist_ok=True)

    def wants(self, name: str) -> bool:
        """Tell whether a case of this name is to be measured."""
        return self.only in name

    def measure(self, group: str, shape: Shape, precision: str, case: Case) -> float | None:
        """Check and time one case that is wanted (a ceiling always is); return its median in milliseconds, if any."""
        if group != "ceiling" and not self.wants(case.name):
            return None
        record: dict[str, Any] = {"group": group, "name": case.name, "shape": asdict(shape), "precision": precision}
        started = time.perf_counter()
        try:
            wrong = case.check() if case.check else ""
            free(self.device)
            if wrong:
                record |= {"status": "wrong result", "why": wrong}
            else:
                runs = [case.run, *([case.reference.run] if case.reference else [])]
                timing, *beside = time_runs(runs, self.device, self.seconds)
                if case.capturable and self.device.type == "cuda":
                    record["eager_ms"] = timing.median_ms
                    timing, *beside = time_runs([captured(run) for run in runs], self.device, self.seconds)
                record |= {"status": "ok" if case.check else "ok, unchecked", **asdict(timing)}
                record["peak_bytes"] = peak_bytes(case.run, self.device, case.held)
                record |= case.figures(timing.median_ms)
                if case.reference:
                    record[f"{case.reference.name}_ms"] = beside[0].median_ms
                    record[f"ratio_to_{case.reference.name}"] = timing.median_ms / beside[0].median_ms
                self.medians[shape.name, case.name] = timing.median_ms
        except torch.OutOfMemoryError:
            record["status"] = "out of memory"
        except Exception as error:  # a peer may fail in any way; the others are measured all the same
            record |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
        record["wall_s"] = round(time.perf_counter() - started, 2)
        free(self.device)
        self._keep(record)
        return record.get("median_ms")

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.out.open("a") as file:
            file.write(json.dumps(record | self.facts) + "\n")
        if not record["status"].startswith("ok"):
            where = f"{record['group']} {record['shape']['name']} {record['name']}"
            self.console.print(f"{where}: {record['status']}. {record.get('why', '')}", markup=False, soft_wrap=True)

    def print_table(self) -> None:
        """Print every result of this session, one line each."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("group")
        table.add_column("size")
        table.add_column("case", no_wrap=True)
        for heading in ("ms", "p10", "p90", "n", "peak GB"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("figures", no_wrap=True)
        for record in self.records:
            head = (record["group"], record["shape"]["name"], f"{record['name']} {record['precision']}")
            if "median_ms" not in record:
                table.add_row(*head, "", "", "", "", "", record["status"].upper())
                continue
            times = (f"{record[key]:.3f}" for key in ("median_ms", "p10_ms", "p90_ms"))
            peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.2f}"
            table.add_row(*head, *times, str(record["iterations"]), peak, _figures(record))
        Console(width=max(160, self.console.width)).print(table, markup=False)
        facts_line = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        self.console.print(facts_line, markup=False, soft_wrap=True)
        self.console.print(f"{len(self.records)} results appended to {self.out}", markup=False, soft_wrap=True)


def _figures(record: dict[str, Any]) -> str:
    labels = {"tflops": "TFLOP/s", "gbs": "GB/s", "share_of_ceiling": "of ceiling"}
    parts = [f"{record[key]:.3g} {label}" for key, label in labels.items() if key in record]
    parts += [f"{value:.2f}x {key[9:]}" for key, value in record.items() if key.startswith("ratio_to_")]
    return ", ".join(parts)

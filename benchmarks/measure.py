"""What is measured, and a session that measures cases and keeps each result as one JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashsae.bench import timing
from flashsae.bench.problem import Shape
from flashsae.bench.timing import captured, free, peak_bytes, time_runs


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


def facts(device: torch.device) -> dict[str, str]:
    """Return the hardware, the versions, the date and the commit (GIT_COMMIT, else git) that belong to every result."""
    commit = os.environ.get("GIT_COMMIT", "")
    if not commit:
        try:
            command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            folder = Path(__file__).parent
            commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return timing.facts(device) | {"commit": commit}


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
                timed, *beside = time_runs(runs, self.device, self.seconds)
                if case.capturable and self.device.type == "cuda":
                    record["eager_ms"] = timed.median_ms
                    timed, *beside = time_runs([captured(run) for run in runs], self.device, self.seconds)
                record |= {"status": "ok" if case.check else "ok, unchecked", **asdict(timed)}
                record["peak_bytes"] = peak_bytes(case.run, self.device, case.held)
                record |= case.figures(timed.median_ms)
                if case.reference:
                    record[f"{case.reference.name}_ms"] = beside[0].median_ms
                    record[f"ratio_to_{case.reference.name}"] = timed.median_ms / beside[0].median_ms
                self.medians[shape.name, case.name] = timed.median_ms
        except torch.OutOfMemoryError:
            record["status"] = "out of memory"
        except Exception as error:  # a peer may fail in any way; the others are measured all the same
            record |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
        record["wall_s"] = round(time.perf_counter() - started, 2)
        free(self.device)
        self.keep(record)
        return record.get("median_ms")

    def keep(self, record: dict[str, Any]) -> None:
        """Append a result to the file; it needs group, name, shape, precision and status."""
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

"""A session measures cases one after another and keeps each result as one JSON line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, Size
from flashsae.bench.measure import Record, measure
from flashsae.bench.timing import facts

RESULTS = Path(__file__).parent / "results"


def provenance(device: torch.device) -> dict[str, str]:
    """Return `facts` and the commit (GIT_COMMIT, else git): what belongs to every result that is kept."""
    commit = os.environ.get("GIT_COMMIT", "")
    if not commit:
        try:
            command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            folder = Path(__file__).parent
            commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return facts(device) | {"commit": commit}


class Session:
    """Measures cases one after another, appends each result to a file, and prints them all at the end.

    Args:
        device: where to measure.
        seconds: budget of one measurement, warm-up apart.
        out: JSON lines file to append to.
        only: regular expression, found in the names of cases to measure.
        skip: found in the names of those to leave out; "" for none.
    """

    def __init__(self, device: torch.device, seconds: float, out: Path, only: str = "", skip: str = "") -> None:
        self.device, self.seconds, self.out, self._only, self._skip = device, seconds, out, only, skip
        self.provenance = provenance(device)
        self.records: list[Record] = []
        self.console = Console()
        out.parent.mkdir(parents=True, exist_ok=True)

    def wants(self, name: str) -> bool:
        """Tell whether a case is to be measured."""
        return bool(re.search(self._only, name)) and not (self._skip and re.search(self._skip, name))

    def measure(self, group: str, size: Size, case: Case) -> Record:
        """Measure and keep one case."""
        started = time.perf_counter()
        record = measure(partial(case.build, size), self.device, self.seconds)
        if "median_ms" in record:
            size.medians.setdefault(case.name, record["median_ms"])  # of several precisions the first is compared with
            if case.ours in size.medians:
                record["ratio_to_ours"] = record["median_ms"] / size.medians[case.ours]
        head = {"group": group, "name": case.name, "shape": asdict(size.shape), "precision": case.precision}
        self.keep(head | record | {"wall_s": round(time.perf_counter() - started, 2)})
        return record

    def keep(self, record: Record) -> None:
        """Append a result to the file; it needs group, name, shape, precision and status."""
        self.records.append(record)
        with self.out.open("a") as file:
            file.write(json.dumps(record | self.provenance) + "\n")
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
        about = ", ".join(f"{key} {value}" for key, value in self.provenance.items())
        self.console.print(about, markup=False, soft_wrap=True)
        self.console.print(f"{len(self.records)} results appended to {self.out}", markup=False, soft_wrap=True)


def _figures(record: Record) -> str:
    labels = {"tflops": "TFLOP/s", "gbs": "GB/s", "share_of_ceiling": "of ceiling"}
    parts = [f"{record[key]:.3g} {label}" for key, label in labels.items() if key in record]
    parts += [f"{value:.2f}x {key[9:]}" for key, value in record.items() if key.startswith("ratio_to_")]
    return ", ".join(parts)

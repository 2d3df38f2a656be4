"""Read the profiler's counters for every kernel of forward and backward: `python -m benchmarks.counters`.

Runs Nsight Compute (`ncu`) on itself, clocks left as they are and caches not flushed between kernels. Writes one JSON
line for each kernel: occupancy, share of the memory's peak throughput, hits in the second-level cache, registers.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from cyclopts import App

from benchmarks import operations, shapes
from benchmarks.cases import Size
from benchmarks.session import RESULTS, provenance
from flashsae.bench.setups import Shape

app = App(name="benchmarks.counters", help=__doc__, version_flags=[])
COUNTERS = {
    "gpu__time_duration.sum": "ms",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_throughput",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_throughput",
    "lts__t_sector_hit_rate.pct": "l2_hits",
    "launch__registers_per_thread": "registers",
}
TO_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}


def profiled(shape: Shape) -> None:
    """Do forward and backward once for the compiler, once for the profiler."""
    size = Size(shape, torch.device("cuda"), 0.0, {})
    passes = operations.forward_backward(size, torch.bfloat16, "bf16")
    passes.run(0)
    torch.cuda.synchronize()
    with torch.autograd.set_multithreading_enabled(False), torch.cuda.nvtx.range("measured"):
        passes.run(1)
        torch.cuda.synchronize()


def counters_of(size: str) -> list[dict[str, str | float]]:
    """Profile one size in a process of its own; return one record a kernel, in order of their launch."""
    command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--nvtx", "--nvtx-include", "measured/"]
    command += ["--csv", "--page", "raw", "--metrics", ",".join(COUNTERS)]
    command += [sys.executable, "-m", "benchmarks.counters", "--only", size]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        raise SystemExit(f"benchmarks.counters: ncu failed.\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    units, *rows = csv.DictReader(lines)
    records: list[dict[str, str | float]] = []
    for row in rows:
        record: dict[str, str | float] = {"kernel": row["Kernel Name"].split("(")[0]}
        for counter, name in COUNTERS.items():
            value = float(row[counter].replace(",", ""))
            record[name] = value * TO_MS[units[counter]] if name == "ms" else value
        records.append(record)
    return records


@app.default
def main(sizes: str = "S,M,L", out: Path = RESULTS / "counters.jsonl", only: str = "") -> None:
    """Read the counters of some sizes.

    Args:
        sizes: by comma.
        out: file to write JSON lines to.
        only: run the passes of this size and read nothing: what the profiler looks at.
    """
    by_name = {shape.name: shape for shape in shapes.SIZES}
    if only:
        profiled(by_name[only])
        return
    if not shutil.which("ncu"):
        raise SystemExit("benchmarks.counters: expected Nsight Compute (ncu) on the PATH, found none.")
    about = provenance(torch.device("cuda"))
    with out.open("w") as file:
        for size in sizes.split(","):
            for record in counters_of(size):
                print(size, *(f"{v:.4g}" if isinstance(v, float) else v[:50] for v in record.values()))
                file.write(json.dumps({"shape": asdict(by_name[size]), **record, **about}) + "\n")


if __name__ == "__main__":
    app()

"""Measure the operations and whole steps: `python -m benchmarks.run ops paper sweep step scale architectures ablation`.

Appends one JSON line for each result and prints a table. A result that a float64 computation contradicts is not timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from cyclopts import App, Parameter

from benchmarks import architectures, operations, shapes
from benchmarks.cases import Case, Group, Size
from benchmarks.openai import OPENAI
from benchmarks.registry import GROUPS
from benchmarks.session import RESULTS, Session
from flashsae.bench.peers import LIBRARIES
from flashsae.bench.setups import Shape, tiny
from flashsae.bench.timing import free
from flashsae.precision import Precision

app = App(name="benchmarks.run", help=__doc__, version_flags=[])
NAMED = list(dict.fromkeys(s.name for s in (*shapes.SIZES, shapes.LARGEST, *architectures.MEASURED_AT)))
NO_SIZE = Shape("", 0, 0, 0, 0)  # of ceilings


def memory_gbs(session: Session) -> dict[str, float]:
    """Measure what the memory can do; return GB/s by name."""
    size = Size(NO_SIZE, session.device, session.seconds, {})
    found = {case.name: session.measure("ceiling", size, case) for case in operations.CEILING_CASES}
    return {name: record["gbs"] for name, record in found.items() if "gbs" in record}


def run_group(session: Session, name: str, group: Group, sizes: list[Shape], gbs: dict[str, float]) -> None:
    """Measure the cases of a group that are wanted, size after size."""
    for shape in sizes:
        size = Size(shape, session.device, session.seconds, gbs)
        for case in group.cases:
            if session.wants(case.name) and (case.at is None or shape.name in case.at) and _is_there(case):
                session.measure(name, size, case)
        size.forget()
        free(session.device)


def _is_there(case: Case) -> bool:
    return case.peer is None or case.peer.is_installed


@app.default
def main(
    *groups: Literal["ops", "paper", "sweep", "step", "scale", "architectures", "ablation", "all"],
    sizes: str = ",".join(NAMED),
    only: str = "",
    skip: str = "",
    precision: str = "",
    out: Path | None = None,
    peers: bool = True,
    seconds: float = 0.3,
    small: Annotated[bool, Parameter(name="--tiny", show=False)] = False,
) -> None:
    """Measure groups of cases.

    Args:
        groups: "ops" (stages and whole passes in bf16, peers beside them), "paper" (certified float32), "sweep"
            (against d_sae, k and d_in), "step" (whole training steps), "scale" (these against d_sae), "architectures"
            (steps of every architecture, in turn with TopK's), "ablation" (from dense PyTorch to ours, one technique at
            a time), or "all". None: ops.
        sizes: sizes of the groups ops, step (which alone has 1M), architectures (M, L, L128, 3S and 3M) and ablation
            (M and L), by comma.
        only: measure only cases in whose name this regular expression is found.
        skip: leave out those in whose name this one is found.
        precision: measure only cases of these precisions, by comma. Whole steps in bf16-int8 and float32-int8 take
            turns with those in bf16 and float32.
        out: file to append JSON lines to. Default: ops.jsonl and step.jsonl under benchmarks/results.
        peers: measure the peers that are installed.
        seconds: budget of one measurement, warm-up apart.
        small: toy sizes, to try the benchmark itself on any device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not small:
        raise SystemExit("benchmarks: expected a CUDA device, found none. Nothing is timed on a CPU.")
    wanted = sizes.split(",")
    if unknown := set(wanted) - set(NAMED):
        raise SystemExit(f"sizes: expected some of {','.join(NAMED)}, got {','.join(sorted(unknown))}.")
    torch.set_float32_matmul_precision("highest")
    for peer in (peer for peer in (*LIBRARIES, OPENAI) if peers and not peer.is_installed):
        print(f"{peer.name} is not installed and left out: {peer.install}")
    precisions = precision.split(",") if precision else []
    if unknown := set(precisions) - set(get_args(Precision)):
        raise SystemExit(
            f"precision: expected some of {','.join(get_args(Precision))}, got {','.join(sorted(unknown))}."
        )
    chosen = {name: GROUPS[name] for name in GROUPS if "all" in groups or name.split()[0] in (groups or ("ops",))}
    for file in dict.fromkeys(group.file for group in chosen.values()):
        session = Session(device, seconds, out or RESULTS / file, only, skip)
        try:
            gbs = memory_gbs(session)
            for name, group in chosen.items():
                if group.file == file:
                    fitting = [shape for shape in group.sizes if shape.name in wanted or shape.name not in NAMED]
                    run_group(
                        session, name, _of(group, peers, precisions), [tiny(s) if small else s for s in fitting], gbs
                    )
        finally:
            session.print_table()


def _of(group: Group, peers: bool, precisions: list[str]) -> Group:
    cases = (case for case in group.cases if peers or case.peer is None)
    return Group(group.file, group.sizes, tuple(c for c in cases if not precisions or c.precision in precisions))


if __name__ == "__main__":
    app()

"""The registry: every group of cases by name. A case more is an entry in the file of its group."""

from __future__ import annotations

from benchmarks import ablation, architectures, operations, passes, shapes, steps
from benchmarks.cases import Group

OPS, STEP, ARCHITECTURES = "ops.jsonl", "step.jsonl", "architectures.jsonl"
GROUPS = {
    "ops": Group(OPS, shapes.SIZES, (*operations.CASES, *passes.CASES)),
    "paper": Group(OPS, shapes.PAPER, (*operations.PAPER_CASES, *passes.PAPER_CASES)),
    **{f"sweep {name}": Group(OPS, sizes, operations.SWEEP_CASES) for name, sizes in shapes.SWEEPS.items()},
    "step": Group(STEP, (*shapes.SIZES, shapes.LARGEST), steps.CASES),
    "scale": Group(STEP, shapes.SCALE, steps.SCALE_CASES),
    "architectures": Group(ARCHITECTURES, architectures.MEASURED_AT, architectures.CASES),
    "ablation": Group(STEP, tuple(s for s in shapes.SIZES if s.name in ("M", "L")), ablation.CASES),
}

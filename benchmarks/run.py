"""Measure the operations and whole steps: `python -m benchmarks.run ops paper sweep step scale ablation`.

Appends one JSON line for each result and prints a table. A result that a float64 computation contradicts is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, Parameter

from benchmarks import baselines, operations, shapes, steps
from benchmarks.measure import Case, Session
from flashsae.bench.dense import Step, dense
from flashsae.bench.peers import LIBRARIES
from flashsae.bench.problem import Problem, Shape, make_problem
from flashsae.bench.timing import free

app = App(name="benchmarks.run", help=__doc__, version_flags=[])
RESULTS = Path(__file__).parent / "results"
GROUPS = {"ops.jsonl": ("ops", "paper", "sweep"), "step.jsonl": ("step", "scale", "ablation")}
SIZES = {shape.name: shape for shape in (*shapes.SIZES, shapes.LARGEST)}


def measure_ceilings(session: Session) -> dict[str, float]:
    """Measure what the memory can do; return GB/s by name."""
    ceilings = {}
    shape = Shape("", 0, 0, 0, 0)
    for case in operations.ceiling_cases(session.device):
        ms = session.measure("ceiling", shape, "", case)
        if ms is not None:
            ceilings[case.name] = case.figures(ms)["gbs"]
    return ceilings


def run_ops(session: Session, sizes: tuple[Shape, ...], ceilings: dict[str, float], peers: bool) -> None:
    """Measure every stage in bf16 weights, then ours and the peers with float32 weights."""
    for shape in sizes:
        measure_stages(session, "ops", shape, "bf16", ceilings)
        measure_steps(session, shape, peers)


def measure_stages(session: Session, group: str, shape: Shape, precision: str, ceilings: dict[str, float]) -> None:
    """Measure the operations of one size one after another, each beside its ceiling."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    problem = make_problem(shape, dtype, session.device)

    def take(case: Case, precision: str = precision) -> None:
        session.measure(group, shape, precision, case)

    def median(name: str) -> Callable[[], float | None]:
        return lambda: session.medians.get((shape.name, name))

    gather_gbs = ceilings.get("gather")
    gemm = operations.gemm_case(problem)
    take(gemm)
    take(operations.encode_case(problem, precision, gemm))
    if session.wants("index") or session.wants("decode_loss") or session.wants("weight_grads"):
        codes = operations.codes_of(problem, "dense")
        take(operations.index_case(problem, codes))
        take(operations.decode_case(problem, codes, precision, gather_gbs))
        take(operations.weight_grads_case(problem, codes, ceilings, "weight_grads", lambda: None))
        if dtype == torch.bfloat16:
            take(operations.weight_grads_case(problem, codes, ceilings, "weight_grads_bf16", lambda: None, dtype))
    if group == "ops" and session.wants("weight_grads_zipf"):
        codes = operations.codes_of(problem, "zipf")
        take(operations.weight_grads_case(problem, codes, ceilings, "weight_grads_zipf", median("weight_grads")))
    take(operations.forward_backward_case(problem, precision))
    if group == "paper":
        for lower in ("tf32", "bf16"):
            take(operations.encode_case(problem, lower, None), lower)


def measure_steps(session: Session, shape: Shape, peers: bool) -> None:
    """Measure forward and backward with float32 weights: ours, then the peers."""
    builders = baselines.builders(peers and shape.name != "XL")
    if not any(session.wants(name) for name in builders):
        return
    free(session.device)
    problem = make_problem(shape, torch.float32, session.device)
    for name, build in builders.items():
        measure_step(session, "ops", problem, name, build)


def measure_step(session: Session, group: str, problem: Problem, name: str, build: Callable[[Problem], Step]) -> None:
    """Build one implementation, measure it and let it go again; a peer that cannot be built is recorded as such."""
    if not session.wants(name):
        return
    shape, ours = problem.shape, "forward_backward" if group == "paper" else "forward_backward_master"
    precision = "float32" if group == "paper" else "autocast"

    def ours_ms() -> float | None:
        return session.medians.get((shape.name, ours))

    try:
        case = baselines.step_case(name, problem, build(problem), ours_ms)
    except Exception as error:
        complaint = f"cannot be built: {type(error).__name__}: {error}"
        case = Case(name, lambda i: None, lambda: complaint)
    session.measure(group, shape, precision, case)


def run_paper(session: Session, ceilings: dict[str, float], scale: Callable[..., tuple[Shape, ...]]) -> None:
    """Measure the setting of the paper, float32 without TF32: certified float32 beside dense autograd."""
    torch.set_float32_matmul_precision("highest")
    for shape in scale(shapes.PAPER):
        measure_stages(session, "paper", shape, "float32", ceilings)
        free(session.device)
        problem = make_problem(shape, torch.float32, session.device)
        measure_step(session, "paper", problem, "dense PyTorch", lambda p: dense(p, "float32"))
        del problem
        free(session.device)


def run_sweep(session: Session, ceilings: dict[str, float], scale: Callable[..., tuple[Shape, ...]]) -> None:
    """Measure decode and weight gradients against d_sae, k and d_in, beside dense products on the scattered code."""
    for variable, sweep in shapes.SWEEPS.items():
        for shape in scale(sweep):
            problem = make_problem(shape, torch.bfloat16, session.device)
            codes = operations.codes_of(problem, "random")
            group = f"sweep {variable}"
            session.measure(
                group, shape, "bf16", operations.decode_case(problem, codes, "bf16", ceilings.get("gather"))
            )
            case = operations.weight_grads_case(problem, codes, ceilings, "weight_grads", lambda: None)
            session.measure(group, shape, "bf16", case)
            session.measure(group, shape, "bf16", operations.dense_decode_case(problem, codes))
            del problem, codes, case
            free(session.device)


@app.default
def main(
    *groups: Literal["ops", "paper", "sweep", "step", "scale", "ablation", "all"],
    sizes: str = "S,M,L,XL,1M",
    only: str = "",
    out: Path | None = None,
    peers: bool = True,
    seconds: float = 0.3,
    tiny: Annotated[bool, Parameter(show=False)] = False,
) -> None:
    """Measure groups of cases.

    Args:
        groups: "ops" (stages and whole passes in bf16, peers beside them), "paper" (certified float32), "sweep"
            (against d_sae, k and d_in), "step" (whole training steps), "scale" (these against d_sae), "ablation" (from
            dense PyTorch to ours, one technique at a time), or "all". None: ops.
        sizes: sizes of the groups ops, step (which alone has 1M) and ablation (which has only M and L), by comma.
        only: measure only cases whose name holds this text.
        out: file to append JSON lines to. Default: ops.jsonl and step.jsonl under benchmarks/results.
        peers: measure the peers that are installed.
        seconds: budget of one measurement, warm-up apart.
        tiny: toy sizes, to try the benchmark itself on any device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        raise SystemExit("benchmarks: expected a CUDA device, found none. Nothing is timed on a CPU.")
    wanted = sizes.split(",")
    if unknown := set(wanted) - SIZES.keys():
        raise SystemExit(f"sizes: expected some of {','.join(SIZES)}, got {','.join(sorted(unknown))}.")
    chosen = {name for names in GROUPS.values() for name in names} if "all" in groups else set(groups) or {"ops"}
    scale: Callable[[Iterable[Shape]], tuple[Shape, ...]] = shapes.tiny if tiny else tuple

    def sized(*names: str) -> tuple[Shape, ...]:
        return scale(SIZES[name] for name in names if name in wanted)

    for peer in (peer for peer in LIBRARIES if peers and not peer.is_installed):
        print(f"{peer.name} is not installed and left out: {peer.install}")
    # the backward pass in the thread of the forward pass, for ours and the peers: handing over costs the host more
    torch.autograd.set_multithreading_enabled(False)
    for file, names in GROUPS.items():
        if not chosen & set(names):
            continue
        session = Session(device, seconds, only, out or RESULTS / file)
        try:
            ceilings = measure_ceilings(session)
            if "ops" in chosen & set(names):
                run_ops(session, sized("S", "M", "L", "XL"), ceilings, peers)
            if "paper" in chosen & set(names):
                run_paper(session, ceilings, scale)
            if "sweep" in chosen & set(names):
                run_sweep(session, ceilings, scale)
            if "step" in chosen & set(names):
                steps.run_step(session, sized(*SIZES), peers)
            if "scale" in chosen & set(names):
                steps.run_scale(session, scale(shapes.SCALE), peers)
            if "ablation" in chosen & set(names):
                steps.run_ablation(session, sized("M", "L"))
        finally:
            session.print_table()


if __name__ == "__main__":
    app()

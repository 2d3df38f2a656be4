"""Whole training steps: the groups step, scale and ablation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

from benchmarks import shapes
from benchmarks.ablation import RUNGS
from benchmarks.measure import Session
from flashsae.bench.ceilings import Ceilings, measure_ceilings
from flashsae.bench.dense import dense
from flashsae.bench.measure import OURS, Record, WholeStep, measure_ours, measure_peer, measure_step
from flashsae.bench.ours import Variant
from flashsae.bench.peers import DENSE, DENSE_COMPILED, LIBRARIES, Peer
from flashsae.bench.problem import Problem, Shape

VARIANTS = {
    f"{OURS}, float32": Variant("float32"),
    f"{OURS}, tf32": Variant("tf32"),
    f"{OURS}, bf16 moments": Variant(moments="bf16"),
    f"{OURS}, clipped": Variant(clip_norm=1.0),
    f"{OURS}, AuxK": Variant(),
}
DEAD_FRACTION = 0.05  # of latents, where AuxK is measured
AT_XL = (DENSE.name, "OpenAI")  # others need more memory there than there is
WITH_VARIANTS = "L"


def _precise(precision: str) -> Peer:
    return Peer(f"{DENSE.name}, {precision}", "torch", precision, partial(dense, precision=precision))


def _keep(session: Session, group: str, shape: Shape, name: str, precision: str, measure: Callable[[], Record]) -> None:
    """Measure one implementation, if it is wanted, and keep its record."""
    if not session.wants(name):
        return
    started = time.perf_counter()
    record = measure()
    ours = session.medians.get((shape.name, group))
    if "median_ms" in record:
        if name == OURS:
            session.medians[shape.name, group] = record["median_ms"]
        elif ours is not None:
            record["ratio_to_ours"] = record["median_ms"] / ours
    head = {"group": group, "name": name, "shape": asdict(shape), "precision": precision}
    session.keep(head | record | {"wall_s": round(time.perf_counter() - started, 2)})


def _ours(
    session: Session, group: str, shape: Shape, name: str, variant: Variant, dead: int, ceilings: Ceilings | None
) -> None:
    measure = partial(measure_ours, variant, shape, session.device, session.seconds, dead=dead, ceilings=ceilings)
    _keep(session, group, shape, name, variant.precision, measure)


def _peers(session: Session, group: str, shape: Shape, peers: Iterable[Peer]) -> None:
    for peer in (peer for peer in peers if peer.is_installed):
        measure = partial(measure_peer, peer, shape, session.device, session.seconds)
        _keep(session, group, shape, peer.name, peer.precision, measure)


def run_step(session: Session, sizes: Iterable[Shape], with_peers: bool) -> None:
    """Measure our step by stage at every size, then others; at L every variant, and dense PyTorch in float32."""
    for shape in sizes:
        ceilings = measure_ceilings(shape, "bf16", session.device, session.seconds)
        _ours(session, "step", shape, OURS, Variant(), 0, ceilings)
        if shape.name == WITH_VARIANTS:
            for name, variant in VARIANTS.items():
                dead = round(DEAD_FRACTION * shape.d_sae) if name.endswith("AuxK") else 0
                limits = measure_ceilings(shape, variant.precision, session.device, session.seconds)
                _ours(session, "step", shape, name, variant, dead, limits)
        if shape.name == shapes.LARGEST.name:
            continue
        chosen = [DENSE, DENSE_COMPILED, *(LIBRARIES if with_peers else ())]
        if shape.name == WITH_VARIANTS:
            chosen += [_precise("tf32"), _precise("float32")]
        if shape.name == "XL":
            chosen = [peer for peer in chosen if peer.name in AT_XL]
        _peers(session, "step", shape, chosen)


def run_scale(session: Session, sizes: Iterable[Shape], with_peers: bool) -> None:
    """Measure against d_sae: our step by stage, dense PyTorch, and every library; what does not fit is recorded so."""
    for shape in sizes:
        ceilings = measure_ceilings(shape, "bf16", session.device, session.seconds)
        _ours(session, "scale", shape, OURS, Variant(), 0, ceilings)
        _peers(session, "scale", shape, (DENSE, *(LIBRARIES if with_peers else ())))


def run_ablation(session: Session, sizes: Iterable[Shape]) -> None:
    """Measure every rung from dense PyTorch to our step."""
    for shape in sizes:
        for name, build in RUNGS.items():
            measure = partial(_measure_rung, build, shape, session)
            _keep(session, "ablation", shape, name, "bf16", measure)


def _measure_rung(build: Callable[[Problem], WholeStep], shape: Shape, session: Session) -> Record:
    return measure_step(build, shape, "bf16", session.device, session.seconds)

"""Whole training steps of every architecture: ours in turn with our TopK's, its dense form, who else trains it."""

from __future__ import annotations

from functools import partial

from benchmarks import shapes
from benchmarks.cases import Case
from benchmarks.steps import our_step, whole_step
from flashsae.architecture import architecture_names
from flashsae.bench.measure import OURS
from flashsae.bench.ours import Variant
from flashsae.bench.peers import LIBRARIES, PYTORCH, PYTORCH_COMPILED, Peer
from flashsae.bench.setups import CROSSCODER_SITES, Shape, base_name

BASE = "topk"
TIMES_TOPK = {
    "batch_topk": 1.10, "abs_topk": 1.10, "matryoshka": 1.25, "jump_relu": 1.25, "relu": 1.25,
    "hierarchical_topk": 1.35, "gated": 1.35, "transcoder": 1.35, "skip_transcoder": 1.35, "crosscoder": 1.15,
}  # fmt: skip
"""What a step of ours may take, times a step of our TopK of the same size."""
_S, _M, _L, _ = shapes.SIZES
WIDE = tuple(
    Shape(f"{CROSSCODER_SITES}{s.name}", s.batch_tokens, CROSSCODER_SITES * s.d_in, s.d_sae, s.k) for s in (_S, _M)
)
"""Where crosscoders are measured, and TopK of the same total width beside them."""
SPARSE = Shape("L128", _L.batch_tokens, _L.d_in, _L.d_sae, 128)
"""Where 0.1 % of all pre-activations are active, as at M: for what selects above a threshold."""
MEASURED_AT = (_M, _L, SPARSE, *WIDE)


def _at(arch: str) -> tuple[str, ...]:
    """Return the names of the sizes where an architecture is measured."""
    if arch == BASE:
        return tuple(size.name for size in MEASURED_AT)
    if arch.partition(":")[0] == "crosscoder":
        return tuple(size.name for size in WIDE)
    sparse = (SPARSE.name,) if base_name(arch) in ("jump_relu", "relu", "gated") else ()
    return (_M.name, _L.name, *sparse)


def _ours(arch: str) -> Case:
    build = partial(our_step, variant=Variant(arch=arch), beside=None if arch == BASE else (BASE, Variant(arch=BASE)))
    return Case(f"{OURS}, {arch}", "bf16", build, _at(arch))


def _other(peer: Peer, arch: str) -> Case:
    build = partial(whole_step, build=peer.build, precision=peer.precision, arch=arch)
    of_library = None if peer.module == "torch" else peer
    return Case(f"{peer.name}, {arch}", peer.precision, build, _at(arch), f"{OURS}, {arch}", of_library)


def _cases(arch: str) -> tuple[Case, ...]:
    trained_by = (peer for peer in LIBRARIES if arch in peer.archs)
    return (_ours(arch), *(_other(peer, arch) for peer in (PYTORCH, PYTORCH_COMPILED, *trained_by)))


def _is_there(arch: str) -> bool:
    return arch.partition(":")[0] in architecture_names(installed=False)


MEASURED = [arch for arch in (*TIMES_TOPK, "matryoshka:topk", "crosscoder:topk") if _is_there(arch)]
CASES = (_ours(BASE), *(case for arch in MEASURED for case in _cases(arch)))

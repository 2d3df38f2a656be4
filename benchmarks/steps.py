"""Whole training steps: the groups step and scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.cases import Case, Size
from benchmarks.openai import OPENAI
from flashsae.bench.dense import dense_pytorch
from flashsae.bench.measure import OURS, StepCase, Subject, WholeStep
from flashsae.bench.ours import Variant, build_ours
from flashsae.bench.peers import LIBRARIES, PYTORCH, PYTORCH_COMPILED, Peer
from flashsae.bench.problem import Problem

DEAD_FRACTION = 0.05  # of latents, where AuxK is measured
WITH_VARIANTS = "L"
BF16_SCREENED, FLOAT32_SCREENED = f"{OURS}, bf16, int8 screen", f"{OURS}, float32, int8 screen"
VARIANTS = {
    BF16_SCREENED: Variant("bf16-int8"),
    FLOAT32_SCREENED: Variant("float32-int8"),
    f"{OURS}, float32": Variant("float32"),
    f"{OURS}, tf32": Variant("tf32"),
    f"{OURS}, bf16 moments": Variant(moments="bf16"),
    f"{OURS}, clipped": Variant(clip_norm=1.0),
    f"{OURS}, AuxK": Variant(),
    f"{OURS}, BatchTopK": Variant(arch="batch_topk"),
}
AT_XL = (PYTORCH.name, OPENAI.name)  # others need more memory there than there is


def our_step(
    size: Size, variant: Variant, dead_fraction: float = 0.0, beside: tuple[str, Variant] | None = None
) -> Subject:
    """Return our step by stage; beside it, in turn, another one of ours, by name."""
    size.forget()
    dead = round(dead_fraction * size.shape.d_sae)
    ceilings = size.ceilings(variant.precision)
    case = StepCase(variant.precision, partial(build_ours, variant=variant), variant.arch, dead, ceilings, beside)
    return case.subject(size.shape, size.device)


def whole_step(size: Size, build: Callable[[Problem], WholeStep], precision: str, arch: str = "topk") -> Subject:
    """Return the step of some implementation."""
    size.forget()
    return StepCase(precision, build, arch).subject(size.shape, size.device)


def peer_case(peer: Peer, at: tuple[str, ...] | None = None, name: str = "") -> Case:
    """Return the entry of a peer."""
    build = partial(whole_step, build=peer.build, precision=peer.precision)
    is_library = peer.module != "torch"
    return Case(name or peer.name, peer.precision, build, at, ours=OURS, peer=peer if is_library else None)


def _variant(name: str, variant: Variant) -> Case:
    dead = DEAD_FRACTION if name.endswith("AuxK") else 0.0
    build = partial(our_step, variant=variant, dead_fraction=dead, beside=variant.unscreened)
    at = None if name == BF16_SCREENED else (WITH_VARIANTS,)
    return Case(name, variant.precision, build, at, ours=OURS)


def _precise(precision: str) -> Peer:
    return Peer(f"{PYTORCH.name}, {precision}", "torch", precision, partial(dense_pytorch, precision=precision))


def _sizes_of(peer: Peer) -> tuple[str, ...]:
    return ("S", "M", "L", "XL") if peer.name in AT_XL else ("S", "M", "L")


FLASHSAE = Case(OURS, "bf16", partial(our_step, variant=Variant()))
CASES = (
    FLASHSAE,
    *(_variant(name, variant) for name, variant in VARIANTS.items()),
    *(peer_case(peer, _sizes_of(peer)) for peer in (PYTORCH, PYTORCH_COMPILED, *LIBRARIES, OPENAI)),
    *(peer_case(_precise(precision), (WITH_VARIANTS,)) for precision in ("tf32", "float32")),
)
SCALE_CASES = (FLASHSAE, *(peer_case(peer) for peer in (PYTORCH, *LIBRARIES, OPENAI)))

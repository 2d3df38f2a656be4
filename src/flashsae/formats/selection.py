"""How an SAE selects its latents in inference: what is left of an architecture for whoever only uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.formats.content import Content

_DEFAULTS = {"transcoder": "topk", "skip_transcoder": "topk", "crosscoder": "batch_topk", "matryoshka": "batch_topk"}
"""Architectures made of another one, and which, where their name does not tell."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""That weights may have."""


@dataclass(frozen=True)
class Selection:
    """The latents of a token that are active in inference, by their pre-activations z.

    Args:
        outer: transcoder, skip_transcoder or crosscoder; "" for an autoencoder.
        name: topk: relu of the k largest; threshold: z · H(z − threshold); relu; any other architecture by its name.
        k: of topk.
        threshold: [d_sae], of threshold; None where BatchTopK brought none along.
    """

    outer: str
    name: str
    k: int = 0
    threshold: Tensor | None = None


def split(architecture: str) -> tuple[str, str]:
    """Return what an architecture is around a selection, and the selection: transcoder:relu is transcoder and relu.

    A matryoshka is in inference what it is made of, so of `matryoshka:topk` there is "" and topk.
    """
    outer, _, inner = architecture.partition(":")
    if outer not in _DEFAULTS:
        return "", architecture
    around, base = split(inner or _DEFAULTS[outer])
    return (around if outer == "matryoshka" else outer), base


def joined(outer: str, base: str) -> str:
    """Return the name of an architecture: transcoder and relu are transcoder:relu, transcoder and topk transcoder."""
    if not outer:
        return base
    return outer if base == _DEFAULTS[outer] else f"{outer}:{base}"


def settings_of_reading(base: str, d_sae: int) -> dict[str, float]:
    """Return settings of a selection that was not trained here and brings none, where defaults may not fit its size."""
    return {"target_l0": float(min(32, d_sae))} if base == "jump_relu" else {}


def selection_of(content: Content) -> Selection:
    """Return how the latents of an SAE are selected in inference."""
    outer, base = split(content.architecture)
    if base in ("topk", "hierarchical_topk"):
        return Selection(outer, "topk", k=int(content.settings["k"]))
    if base == "batch_topk":
        threshold = content.tensors.get("threshold")  # what exceeds it goes through a ReLU
        spread = None if threshold is None else threshold.clamp_min(0).expand(content.d_sae).contiguous()
        return Selection(outer, "threshold", threshold=spread)
    if base == "jump_relu":
        return Selection(outer, "threshold", threshold=content.tensors["threshold"])
    return Selection(outer, base)


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> torch.dtype:
    """Raise CheckpointError unless a file holds the tensors that it must, and none that it may not.

    Args:
        path: of the file, for the message.
        tensors: that it holds, by name.
        shapes: of those that it must hold; -1 stands for any positive number.
        optional: of those that it may hold.
    Returns:
        the widest of their dtypes.
    """
    allowed = {**shapes, **(optional or {})}
    missing, foreign = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - allowed.keys())
    if missing or foreign:
        wrong = f"it has no {', '.join(missing)}" if missing else f"{', '.join(foreign)[:200]} is none of its tensors"
        raise CheckpointError(
            f"{path} is damaged or not of this format: {wrong}; expected {', '.join(sorted(allowed))}. Fetch it again."
        )
    dtype = None
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), allowed[name]
        fits = len(shape) == len(wanted) and all(
            size == want or (want == -1 and size > 0) for size, want in zip(shape, wanted)
        )
        if not fits or tensor.dtype not in DTYPES:
            expected = f"floats {[size if size >= 0 else 'any' for size in wanted]}".replace("'", "")
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path} is damaged: {name}: expected {expected}, got {kind} {list(shape)}. Fetch it again."
            )
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    assert dtype is not None
    return dtype

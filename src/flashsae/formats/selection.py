"""How an SAE selects its latents in inference: what is left of an architecture for whoever only uses it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashsae.formats.content import Content

_DEFAULTS = {"transcoder": "topk", "skip_transcoder": "topk", "crosscoder": "batch_topk", "matryoshka": "batch_topk"}
"""Architectures made of another one, and which, where their name does not tell."""
_NAMES = {"hierarchical_topk": "topk", "batch_topk": "threshold", "jump_relu": "threshold"}
_TARGET_L0 = 32.0


@dataclass(frozen=True)
class Selection:
    """The latents of a token that are active in inference, by their pre-activations z.

    Args:
        outer: transcoder, skip_transcoder or crosscoder; "" for an autoencoder.
        base: the architecture within it, and a matryoshka; hierarchical_topk is topk in inference.
        name: topk: relu of the k largest; threshold: z · H(z − threshold); relu; any other architecture by its name.
        k: of topk.
        threshold: [d_sae], of threshold; None where BatchTopK brought none along.
    """

    outer: str
    base: str
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


def settings_of_reading(base: str, d_sae: int, l0: float | None = None) -> dict[str, float]:
    """Return settings of a selection that was not trained here, where defaults may not fit its size.

    Args:
        base: jump_relu has a target, others nothing.
        d_sae: which no target exceeds.
        l0: that it is known to have, or was trained for; None, or what is not above 0, where it is not known.
    """
    known = l0 if l0 is not None and l0 > 0 else _TARGET_L0
    return {"target_l0": min(float(known), float(d_sae))} if base == "jump_relu" else {}


def name_of(base: str) -> str:
    """Return what selects in inference, as the name of a `Selection`: topk, threshold, or the architecture itself."""
    return _NAMES.get(base, base)


def selection_of(content: Content) -> Selection:
    """Return how the latents of an SAE are selected in inference."""
    outer, base = split(content.architecture)
    name = name_of(base)
    if name == "topk":
        return Selection(outer, "topk", name, k=int(content.settings["k"]))
    if base == "batch_topk":
        threshold = content.tensors.get("threshold")  # what exceeds it goes through a ReLU
        spread = None if threshold is None else threshold.clamp_min(0).expand(content.d_sae).contiguous()
        return Selection(outer, base, name, threshold=spread)
    return Selection(outer, base, name, threshold=content.tensors["threshold"] if base == "jump_relu" else None)


def l0_of(content: Content) -> int | None:
    """Return how many latents are active for a token, on average, as far as an SAE tells it; at least 1."""
    for value in (content.settings.get("k"), content.metadata.get("l0"), content.settings.get("target_l0")):
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            return min(content.d_sae, max(1, round(value)))
    return None

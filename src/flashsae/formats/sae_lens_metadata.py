"""What is known of an SAE beside its weights, in the words of SAELens and in ours.

SAELens keeps any metadata, and asks for some in its own evaluations: model_name, hook_name, context_size, prepend_bos
and a few more. Ours go with them under "flashsae", so that an SAE of ours comes back as what it was: with the settings
of its training, and with numbers that only a training needs. Theirs are kept under "saelens", and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata as packages
from typing import Any

import torch
from torch import Tensor

from flashsae.formats.content import Content, kept_of
from flashsae.formats.hook_names import hook_name_of, hookpoint_of, model_name_of, model_of, path_in_model
from flashsae.formats.selection import split
from flashsae.settings.prefixes import prefixes_of

KEPT = "saelens"
"""Under which name we keep what they know."""
OURS = "flashsae"
"""Under which name they keep what we know."""
VERSION = "6.54.12"
"""Of SAELens, whose layout is written."""
RESHAPED, NORMALIZED = "reshape_activations", "normalize_activations"
"""What of cfg.json is kept beside their metadata, where nothing else tells it."""
SCALED = "expected_average_only_in"
"""That an SAE is for activations of mean norm √d_in, which whoever uses it has to see to."""
_TRAINED_AS = {
    "batch_topk": "batchtopk", "topk": "topk", "abs_topk": "abstopk", "jump_relu": "jumprelu", "relu": "standard",
    "gated": "gated",
}  # fmt: skip
_LARGEST = 1e300
_CHANGES = ("center_writing_weights", "fold_ln", "fold_value_biases", "refactor_factored_attn_matrices")
"""That transformer-lens makes to weights where it is asked to, so that places in the model hold other numbers."""
_HF, _CAUSAL = "HookedTransformer", "AutoModelForCausalLM"


def ours_of(theirs: Mapping[str, Any], *, is_transcoder: bool) -> dict[str, Any]:
    """Return what SAELens's metadata say in our names; what they do not say is left out."""
    ours: dict[str, Any] = {}
    name = theirs.get("model_name")
    if isinstance(name, str) and name:
        ours["model"] = model_of(name)
    places = [_hookpoint(theirs, end) for end in (("", "_out") if is_transcoder else ("",))]
    if all(places):
        ours["hookpoint"] = ", ".join(map(str, places))
    for known, kind, own in (
        ("context_size", int, "context_length"),
        ("dataset_path", str, "dataset"),
        ("prepend_bos", bool, "prepend_bos"),
    ):
        value = theirs.get(known)
        if type(value) is kind and (value or kind is bool):
            ours[own] = value
    return ours


def _hookpoint(theirs: Mapping[str, Any], end: str) -> str | None:
    """Return the hookpoint; None of one head alone, and of a model whose weights were changed, which none has here."""
    changes = theirs.get("model_from_pretrained_kwargs")
    is_changed = isinstance(changes, Mapping) and any(changes.get(name) for name in _CHANGES)
    if is_changed or theirs.get(f"hook_head_index{end}") is not None:
        return None
    hook, path, name = (theirs.get(each) for each in (f"hook_name{end}", f"hf_hook_name{end}", "model_name"))
    if isinstance(hook, str) and theirs.get("model_class_name") == _CAUSAL:
        return hook
    found = hookpoint_of(hook, name if isinstance(name, str) else None) if isinstance(hook, str) else None
    if found is not None or not isinstance(path, str):
        return found
    side = next((side for word, side in ((".input", ":in"), (".output", "")) if path.endswith(word)), None)
    return path if side is None else f"{path.rpartition('.')[0]}{side}"


def theirs_of(content: Content) -> dict[str, Any]:
    """Return the metadata that SAELens is to have of an SAE."""
    ours = {name: value for name, value in content.metadata.items() if name != KEPT}
    theirs = {
        name: value for name, value in kept_of(content.metadata, KEPT).items() if name not in (RESHAPED, NORMALIZED)
    }
    is_transcoder = bool(split(content.architecture)[0])
    known = _named(ours, is_transcoder=is_transcoder)
    is_the_same = bool(theirs) and ours_of(theirs, is_transcoder=is_transcoder).items() <= ours.items()
    if is_the_same:
        known = {name: value for name, value in known.items() if theirs.get(name) is None}
    theirs |= known
    version = str(theirs.get("sae_lens_version") or "")
    theirs["sae_lens_version"] = version if version.partition(".")[0] in ("6", "7", "8", "9") else VERSION
    theirs.setdefault("sae_lens_training_version", None)
    theirs |= {name: value for name, value in _training(content).items() if name not in theirs}
    own = {
        "version": packages.version("flashsae"),
        "architecture": content.architecture,
        "settings": dict(content.settings),
        "numbers": {
            name: value.item()
            for name, value in content.tensors.items()
            if value.dim() == 0 and abs(value.item()) < _LARGEST
        },
        "metadata": ours,
    }
    return {**theirs, OURS: own}


def reshaped_for(theirs: Mapping[str, Any]) -> str:
    """Return how SAELens is to reshape activations: those of heads come apart there, and beside each other here."""
    return "hook_z" if str(theirs.get("hook_name") or "").endswith("hook_z") else "none"


def _named(ours: Mapping[str, Any], *, is_transcoder: bool) -> dict[str, Any]:
    """Return our metadata in SAELens's names, with the values that SAELens gives where it does not know."""
    model, hookpoint = (str(ours.get(name) or "") for name in ("model", "hookpoint"))
    named_places = hookpoint.split(",") if is_transcoder else [hookpoint]
    places = [place.strip() for place in named_places if place.strip()]
    if is_transcoder and len(places) == 1 and ":" not in hookpoint:
        places = [f"{hookpoint}:in", hookpoint]  # a module alone stands for what it is given and what it gives
    named: dict[str, Any] = {
        "model_name": model_name_of(model) or None,
        "model_class_name": _HF,
        "hook_name": None,
        "hook_head_index": None,
        "context_size": ours.get("context_length"),
        "prepend_bos": ours.get("prepend_bos", True),
        "seqpos_slice": [None],
        "dataset_path": ours.get("dataset"),
        "model_from_pretrained_kwargs": {},
        "neuronpedia_id": None,
    }
    hooks, paths = [hook_name_of(place, model) for place in places], [path_in_model(place, model) for place in places]
    if not all(hooks):  # SAELens reads them from the model itself, where it can hook outputs alone
        named["model_class_name"] = _CAUSAL
        hooks = [None if path.endswith(":in") else path for path in paths]
    for end, hook, path in zip(("", "_out"), hooks, paths):
        named[f"hook_name{end}"] = hook
        named[f"hf_hook_name{end}"] = f"{path.removesuffix(':in')}.input" if path.endswith(":in") else path
    return named


def _training(content: Content) -> dict[str, Any]:
    """Return what an SAE was trained as, where SAELens has a name for it."""
    base = split(content.architecture)[1]
    is_nested = content.architecture.partition(":")[0] == "matryoshka"
    name = _TRAINED_AS.get(base, base)
    if is_nested and base == "batch_topk":
        name = "matryoshka_batchtopk"
    details = {name: content.settings[name] for name in ("k", "target_l0") if name in content.settings}
    if is_nested and "prefixes" in content.settings:
        details["matryoshka_widths"] = prefixes_of(content.settings["prefixes"], content.d_sae)
    metrics = content.metadata.get("metrics")
    l0 = metrics.get("l0") if isinstance(metrics, Mapping) else None
    known = {"l0": l0} if isinstance(l0, int | float) and not isinstance(l0, bool) else {}
    return {"training_architecture": name, "training_architecture_details": details, **known}


def numbers_of(block: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Return the numbers that an SAE of ours had, from what is kept of it, in the dtype of another tensor."""
    numbers = block.get("numbers")
    known = numbers.items() if isinstance(numbers, Mapping) else ()
    return {
        name: torch.tensor(value, dtype=torch.float64, device="cpu").to(like.dtype)
        for name, value in known
        if type(value) in (int, float) and abs(value) < _LARGEST
    }

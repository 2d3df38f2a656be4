"""Where SAEs of dictionary_learning lie, and what config.json beside them says.

A training writes trainer_{i}/ae.pt and trainer_{i}/config.json, and during it trainer_{i}/checkpoints/ae_{step}.pt,
which go by the same config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json
from flashsae.files.schema import Finite, Size, parse
from flashsae.formats.checks import glimpse, without_nan
from flashsae.formats.content import kept_of
from flashsae.formats.hook_names import hook_name_of, hookpoint_of, is_hookpoint, layer_of
from flashsae.natural import in_order

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
ADVICE = "Save the SAE again."
_CHECKPOINT = r"ae_\d+\.pt"
_DEPTH = 4
"""Of folders that are looked into: a run, a submodule, a trainer, its checkpoints."""
_MOST = 10_000
"""Folders that are looked into, of a place that may be anything."""
_ONLY_OURS = "flashsae"
_SUBMODULES = {
    "resid_post": "hook_resid_post",
    "resid_out": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
"""What they call a place in a model, without its layer, and what transformer-lens does."""


@dataclass(frozen=True)
class Trainer:
    """What of `trainer` in config.json an SAE is read by."""

    dict_class: str
    activation_dim: Size | None = None
    dict_size: Size | None = None
    k: Size | None = None
    target_l0: Finite | None = None


@dataclass(frozen=True)
class Config:
    """The content of config.json."""

    trainer: Trainer
    path: Path
    content: dict[str, Any] = field(default_factory=dict)


def weights_of(path: Path) -> Path:
    """Return the file of weights that a place means: itself, or ae.pt in a folder."""
    return path if path.suffix == ".pt" else path / WEIGHTS


def is_checkpoint(weights: Path) -> bool:
    """Tell whether a file is of the middle of a training, where k may not be that of its end."""
    return re.fullmatch(_CHECKPOINT, weights.name) is not None


def _config_path(weights: Path) -> Path:
    """Return config.json of a file of weights: beside it, of a checkpoint in the folder above."""
    own = weights.parent / CONFIG
    return weights.absolute().parent.parent / CONFIG if is_checkpoint(weights) and not own.exists() else own


def detects(path: Path) -> bool:
    """Tell whether a file or folder is of dictionary_learning, or a folder holds some that are."""
    return _is_one(path) or bool(parts(path))


def _is_one(path: Path) -> bool:
    weights = weights_of(path)
    try:
        is_named = weights.name == WEIGHTS or is_checkpoint(weights)
        return is_named and isinstance(glimpse(_config_path(weights)).get("trainer"), dict)
    except OSError:
        return False


def parts(path: Path) -> dict[str, Path]:
    """Return the SAEs in a folder and below by their paths in it: the folder of each, of checkpoints the file.

    Of a folder that is one itself there are none.
    """
    if _is_one(path):
        return {}
    if path.name == "checkpoints":
        return {name: path / name for name in _names(path) if is_checkpoint(path / name) and _is_one(path / name)}
    found = {}
    for folder, folders, _ in islice(os.walk(path), _MOST):
        below = Path(folder).relative_to(path)
        folders[:] = [name for name in folders if name[0] != "." and len(below.parts) < _DEPTH]
        if below.parts and _is_one(Path(folder)):
            found[below.as_posix()] = Path(folder)
    return {name: found[name] for name in in_order(found)}


def _names(path: Path) -> list[str]:
    try:
        return in_order(os.listdir(path))
    except OSError:
        return []


def config_of(weights: Path) -> Config:
    """Return what is said of a file of weights.

    Raises:
        CheckpointError: there is no config.json, or it is damaged.
    """
    path = _config_path(weights)
    content = load_json(path, ADVICE)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: expected an object. {ADVICE}")
    return Config(
        parse(dict[str, Trainer], {"trainer": content.get("trainer")}, str(path), ADVICE)["trainer"], path, content
    )


def metadata_of(config: Config) -> dict[str, Any]:
    """Return what is known of the training, in our names, and under theirs what we have no names for."""
    content = without_nan(config.content)
    trainer, buffer = content["trainer"], content.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    model, submodule = trainer.get("lm_name"), trainer.get("submodule_name")
    told: dict[str, Any] = {"model": model} if isinstance(model, str) and model else {}
    told |= {"context_length": buffer["ctx_len"]} if type(buffer.get("ctx_len")) is int else {}
    hookpoint = _hookpoint(submodule, told.get("model")) if isinstance(submodule, str) else None
    told |= {"hookpoint": hookpoint} if hookpoint else {}
    own = content.get(_ONLY_OURS)
    if isinstance(own, dict):
        return {**told, **{name: value for name, value in own.items() if name != NAME}}
    return {**told, NAME: {"trainer": trainer, **({"buffer": buffer} if buffer else {})}}


def _hookpoint(submodule: str, model: str | None) -> str | None:
    found = re.fullmatch(r"(\w+?)_layer_?(\d{1,9})", submodule)
    if found and found[1] in _SUBMODULES:
        return hookpoint_of(f"blocks.{int(found[2])}.{_SUBMODULES[found[1]]}", model)
    return submodule if is_hookpoint(submodule) else None


def written(metadata: Mapping[str, Any], of_sae: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        metadata: of the SAE, by our names.
        of_sae: what `trainer` says of it: trainer_class, dict_class, activation_dim, dict_size and k.
    """
    theirs = kept_of(metadata, NAME)
    trainer, buffer = kept_of(theirs, "trainer"), kept_of(theirs, "buffer")
    is_same = trainer.get("dict_class") == of_sae["dict_class"]
    kept: dict[str, Any] = (
        trainer
        if is_same
        else {name: trainer[name] for name in ("layer", "lm_name", "submodule_name") if name in trainer}
    )
    hookpoint, model = (
        each if isinstance(each := metadata.get(name), str) else None for name in ("hookpoint", "model")
    )
    place = {
        "layer": kept.get("layer"),
        "lm_name": model or kept.get("lm_name") or "",
        "submodule_name": kept.get("submodule_name"),
    }
    if hookpoint:
        place |= {"layer": layer_of(hookpoint), "submodule_name": submodule_of(hookpoint, model)}
        buffer["io"] = "in" if hookpoint.endswith(":in") else "out"
    own_class = (
        {"trainer_class": kept["trainer_class"]} if is_same and isinstance(kept.get("trainer_class"), str) else {}
    )
    buffer |= {
        "ctx_len": metadata.get("context_length", buffer.get("ctx_len")),
        "d_submodule": of_sae["activation_dim"],
    }
    own = {name: value for name, value in metadata.items() if name != NAME}
    return {"trainer": {**kept, **of_sae, **own_class, **place}, "buffer": buffer, _ONLY_OURS: own}


def submodule_of(hookpoint: str, model: str | None) -> str:
    """Return what they call a hookpoint: resid_post_layer_6; what they have no name for, as we do."""
    hook = hook_name_of(hookpoint, model) or ""
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    name = next((name for name, each in _SUBMODULES.items() if found and each == found[2]), None)
    return f"{name}_layer_{found[1]}" if found and name else hookpoint

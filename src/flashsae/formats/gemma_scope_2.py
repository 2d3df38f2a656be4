"""Gemma Scope 2: SAEs and transcoders of Gemma 3, config.json and params.safetensors.

    f = relu(z) · H(z − threshold),   z = x @ w_enc + b_enc;   y_hat = f @ w_dec + b_dec (+ x @ affine_skip_connection)

b_dec is not subtracted from what goes in. affine_skip_connection is [d_in, d_out], and W_skip its transpose. Where
there is no config.json, the folder tells what it does.

Source: Gemma Scope 2 report (Google DeepMind 2025); google/gemma-scope-2 on the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json, load_tensors
from flashsae.files.schema import Range, parse
from flashsae.formats.checks import check_alone, check_finite, check_tensors, of_one_dtype, sizes
from flashsae.formats.content import Content, Format
from flashsae.formats.released import (
    folders_with,
    jump_relu,
    known,
    number_in,
    place_of,
)

_CONFIG, _FILE = "config.json", "params.safetensors"
_ADVICE = "Fetch it again."
_OF_LAYER = r"params_layer_\d+\.safetensors"
_SKIP = "affine_skip_connection"
_BEFORE_MLP = ".pre_feedforward_layernorm"
_TRANSCODER = r"/transcoder(_all)?/"
_SITES = {
    "resid_post": ("model.layers.{}.output", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", None),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output", None),
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm.output", "model.layers.{}.post_feedforward_layernorm.output",
    ),
}  # fmt: skip
"""What the folders of a repository hold: what goes in, and what comes out where that is something else."""


@dataclass(frozen=True)
class _Config:
    """What config.json says."""

    architecture: Literal["jump_relu"] = "jump_relu"
    model_name: str | None = None
    hf_hook_point_in: str | None = None
    hf_hook_point_out: str | None = None
    affine_connection: bool | None = None
    width: int | None = None
    l0: Annotated[float, Range(0)] | None = None
    type: str | None = None


def detects(path: Path) -> bool:
    """Tell whether a folder has a params.safetensors, or some have that are called so, or a file is one."""
    try:
        names = os.listdir(path) if path.is_dir() else [path.name] if os.path.isfile(path) else []
    except OSError:
        return False
    return any(each == _FILE or re.fullmatch(_OF_LAYER, each) for each in names) or bool(parts(path))


def parts(path: Path) -> dict[str, Path]:
    """Return the SAEs of a folder such as transcoder_all, by the names of theirs."""
    return folders_with(path, _FILE, "layer_*_width_*")


def read(path: Path) -> Content:
    """Return what a folder holds."""
    check_alone(path, parts(path))
    if path.is_dir() and any(re.fullmatch(_OF_LAYER, each) for each in os.listdir(path)):
        raise _cross_layer(path)
    file = path / _FILE if path.is_dir() else path
    if re.fullmatch(_OF_LAYER, file.name):
        raise _cross_layer(file)
    place = place_of(file)
    config_file = file.with_name(_CONFIG)
    config = _inferred(place)
    if config_file.exists():
        config = parse(_Config, load_json(config_file, _ADVICE), str(config_file), _ADVICE)
    kind = config.type or ""
    if re.search("clt|cross", kind):
        raise _cross_layer(file)
    weights = load_tensors(file)
    if "w_dec" in weights and weights["w_dec"].dim() == 3:
        raise _cross_layer(file)
    (F,), (d_in, _), (_, d_out) = sizes(weights, "b_enc", 1), sizes(weights, "w_enc", 2), sizes(weights, "w_dec", 2)
    shapes = {"w_enc": (d_in, F), "w_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,), "threshold": (F,)}
    check_tensors(file, weights, shapes, {_SKIP: (d_in, d_out)})
    _check(config, config_file, F, has_skip=_SKIP in weights)
    is_transcoder = config.hf_hook_point_out not in (None, config.hf_hook_point_in) or d_in != d_out
    is_transcoder = is_transcoder or "transcoder" in kind or re.search(_TRANSCODER, place) is not None
    check_finite(file, weights)
    tensors = of_one_dtype(weights)
    tensors["W_enc_T"], tensors["W_dec"] = tensors.pop("w_enc").T.contiguous(), tensors.pop("w_dec")
    if _SKIP in tensors:
        tensors["W_skip"] = tensors.pop(_SKIP).T.contiguous()
    outer = "skip_transcoder" if "W_skip" in tensors else "transcoder" if is_transcoder else ""
    return jump_relu(tensors, outer, config.l0, _metadata(config, place))


def _check(config: _Config, path: Path, F: int, *, has_skip: bool) -> None:
    if config.width not in (None, F):
        raise CheckpointError(f"{path} says width {config.width}, and {_FILE} beside it has {F} latents. {_ADVICE}")
    if config.affine_connection is not None and config.affine_connection != has_skip:
        said, there = ("an", "none") if config.affine_connection else ("no", "one")
        raise CheckpointError(f"{path} says that there is {said} affine connection, and {_FILE} has {there}. {_ADVICE}")


def _inferred(place: str) -> _Config:
    """Return what the folder tells, where there is no config.json."""
    layer, site = number_in(place, r"/layer_(\d+)_"), re.search(rf"/({'|'.join(_SITES)})(_all)?/", place)
    repository = re.search(r"gemma-scope-2-([\w.]+-(?:pt|it))(?=/)", place)
    model = f"google/gemma-3-{repository[1]}" if repository else None
    if layer is None or site is None:
        return _Config(model_name=model)
    reads, writes = (each and each.format(layer) for each in _SITES[site[1]])
    return _Config(model_name=model, hf_hook_point_in=reads, hf_hook_point_out=writes)


def _metadata(config: _Config, place: str) -> dict[str, object]:
    model = config.model_name
    if model is not None:
        model = model if "/" in model else f"google/{model}"
        model = re.sub(r"gemma-(?:v)?3-270m-pt$", "gemma-3-270m", model.replace("gemma-v3", "gemma-3"))
    names = [config.hf_hook_point_in, config.hf_hook_point_out]
    hookpoints = [_hookpoint(each) for each in dict.fromkeys(names) if each is not None]
    hookpoint = ", ".join(each for each in hookpoints if each) if all(hookpoints) else None
    own = {name: value for name, value in asdict(config).items() if value is not None and name != "architecture"}
    return known(model=model, hookpoint=hookpoint or None, l0=config.l0, gemma_scope_2=own)


def _hookpoint(name: str) -> str | None:
    """Return model.layers.3.self_attn.o_proj.input as layers.3.self_attn.o_proj:in."""
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?(?:model\.)?([\w.]+)\.(input|output)", name)
    if found is None:
        return None
    if (
        found[1].endswith(_BEFORE_MLP) and found[2] == "output"
    ):  # the same values, by the name that others have for them
        return found[1].removesuffix(_BEFORE_MLP) + ".mlp:in"
    return found[1] + (":in" if found[2] == "input" else "")


def _cross_layer(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is of a cross-layer transcoder or crosscoder of Gemma Scope 2, with decoders for several layers, "
        "which are not read here: take one of the folder transcoder_all, which has one for each layer, or use SAELens."
    )


FORMAT = Format(
    "gemma_scope_2",
    "Gemma Scope 2",
    detects,
    read,
    parts=parts,
    source="Gemma Scope 2 report, 2025; huggingface.co/google/gemma-scope-2",
)

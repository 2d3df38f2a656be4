"""Qwen-Scope: TopK SAEs of Qwen 3 and 3.5, one file layer{n}.sae.pt for each layer.

    f = relu(TopK(x @ W_encᵀ + b_enc, k));   x_hat = f @ W_decᵀ + b_dec

b_dec is not subtracted from what goes in. W_enc is [d_sae, d_in] and W_dec [d_in, d_sae]. No file says what k is: the
name of the repository does, Qwen/SAE-Res-{model}-W{d_sae / 1024}K-L0_{k}.

Source: Qwen-Scope (Qwen team 2026) on the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json, load_pickle
from flashsae.files.schema import Size, parse
from flashsae.formats.checks import check_finite, check_tensors, of_one_dtype, sizes
from flashsae.formats.content import Content, Format
from flashsae.formats.released import known, number_in, place_of
from flashsae.natural import in_order

_FILE = r"layer(\d+)\.sae\.pt"
_CONFIG = "config.json"
_ADVICE = "Fetch it again."
_REPOSITORY = r"SAE-Res-([\w.-]+?)-W\d+K-L0_\d+"


@dataclass(frozen=True)
class _Config:
    """A config.json that somebody put there."""

    k: Size | None = None


def detects(path: Path) -> bool:
    """Tell whether a file is called as one of a layer, or a folder has some."""
    return bool(_layers(path))


def parts(path: Path) -> dict[str, Path]:
    """Return the files of a folder by hookpoint; {} where it has one."""
    layers = _layers(path)
    return layers if len(layers) > 1 else {}


def _layers(path: Path) -> dict[str, Path]:
    try:
        names = os.listdir(path) if path.is_dir() else [path.name] if os.path.isfile(path) else []
    except OSError:
        return {}
    folder = path if path.is_dir() else path.parent
    found = map(re.compile(_FILE).fullmatch, in_order(names))
    return {f"layers.{each[1]}": folder / each[0] for each in found if each}


def read(path: Path) -> Content:
    """Return the SAE of a layer."""
    layers = _layers(path)
    if len(layers) != 1:
        there = f"SAEs of {len(layers)} layers" if layers else "no layer0.sae.pt or the like"
        raise CheckpointError(f"{path} holds {there}: name the file of one.")
    ((hookpoint, file),) = layers.items()
    weights = {name: value for name, value in load_pickle(file).items() if isinstance(value, Tensor)}
    (F,), (d,) = sizes(weights, "b_enc", 1), sizes(weights, "b_dec", 1)
    check_tensors(file, weights, {"W_enc": (F, d), "W_dec": (d, F), "b_enc": (F,), "b_dec": (d,)})
    check_finite(file, weights)
    tensors = of_one_dtype(weights)
    tensors["W_enc_T"], tensors["W_dec"] = tensors.pop("W_enc"), tensors["W_dec"].T.contiguous()
    found = re.findall(_REPOSITORY, place_of(file))
    return Content(
        architecture="topk",
        settings={"k": _k(file, F)},
        tensors=tensors,
        apply_b_dec_to_input=False,
        metadata=known(model=f"Qwen/{found[-1]}" if found else None, hookpoint=hookpoint),
    )


def _k(file: Path, F: int) -> int:
    config = file.with_name(_CONFIG)
    k = parse(_Config, load_json(config, _ADVICE), str(config), _ADVICE).k if config.exists() else None
    k = k or number_in(place_of(file), r"-L0_(\d+)(?=[/_-]|$)")
    if not k:
        raise CheckpointError(
            f"{file} does not say how many latents are active, k: put it into a folder called as its repository, which "
            'ends with -L0_50 or the like, or a config.json with {"k": 50} beside it.'
        )
    if k > F:
        raise CheckpointError(
            f"{file} has {F} latents, and by its folder or {_CONFIG} {k} of them are active. {_ADVICE}"
        )
    return k


FORMAT = Format(
    "qwen_scope",
    "Qwen-Scope",
    detects,
    read,
    parts=parts,
    source="Qwen-Scope, 2026; huggingface.co/collections/Qwen/qwen-scope",
)

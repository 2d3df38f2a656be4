"""The transcoders of circuit-tracer: config.yaml, and layer_{i}.safetensors for every layer of a model.

    acts = activation(x @ W_enc.T + b_enc);   y_hat = acts @ W_dec + b_dec + x @ W_skip.T

with W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d], and in some W_skip [d, d] and activation_function.threshold [F].
Nothing is subtracted from x. The activation is the one that config.yaml names for all layers, topk with one k, or relu;
where it names none, each file with thresholds has those of JumpReLU, and each without is a ReLU.

Its loader takes the tensors of that activation and no other, so k stands in config.yaml alone: the tensor k that its
own `to_safetensors` writes is read here, and refused there. Its topk has no ReLU behind it, ours does: they differ on
tokens where fewer than k pre-activations are positive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError
from flashsae.files import atomic
from flashsae.files.documents import load_tensors, load_yaml, write_yaml
from flashsae.files.schema import Size, Text, parse
from flashsae.formats.checks import (
    INSTEAD,
    check_tensors,
    check_threshold,
    of_one_dtype,
    refuse_normalization,
    refuse_unset,
    refuse_widths,
    sizes,
)
from flashsae.formats.circuit_tracer_layers import NAME, by_layer, hooks_of, places_of
from flashsae.formats.content import Content, Format, kept_of
from flashsae.formats.folds import subtracting
from flashsae.formats.hook_names import model_name_of, model_of
from flashsae.formats.selection import joined, selection_of, settings_of_reading

_CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(0|[1-9]\d{0,8})\.safetensors")
_THRESHOLD = "activation_function.threshold"
_BY_FILE = (None, "jumprelu", "jump_relu")
"""Activations that the tensors tell."""
_LARGEST_CONFIG = 1 << 20
_FETCH = "Fetch it again."


@dataclass(frozen=True)
class _Config:
    """What is read of config.yaml."""

    model_kind: Text
    feature_input_hook: Text
    feature_output_hook: Text
    model_name: Text | None = None
    scan: Text | list[Text] | None = None
    activation: Text | None = None
    k: Size | None = None
    transcoders: list[Text] | None = None
    hookpoints: list[Text] | None = None
    """Of every layer, by our names; written here alone."""


def detects(path: Path) -> bool:
    """Tell whether a folder, or a file of a layer in one, holds transcoders of circuit-tracer."""
    folder = path.parent if _LAYER.fullmatch(path.name) and path.is_file() else path
    with suppress(OSError, ValueError):
        if (folder / _CONFIG).is_file():
            with open(folder / _CONFIG, "rb") as file:
                return re.search(rb"\bmodel_kind[\"']?\s*:", file.read(_LARGEST_CONFIG)) is not None
    return False


def parts(folder: Path) -> dict[str, Path]:
    """Return the files of all layers, as layer_3; {} of a file, or of a folder that holds one layer.

    Raises:
        CheckpointError: a layer is missing, or config.yaml is damaged or of something else.
    """
    if not folder.is_dir():
        return {}
    _config(folder)
    count = _count(folder)
    return {f"layer_{number}": folder / f"layer_{number}.safetensors" for number in range(count)} if count > 1 else {}


def read(path: Path) -> Content:
    """Return the transcoder of a layer.

    Args:
        path: of its file, or of a folder that holds one layer alone.
    Raises:
        CheckpointError: a file is missing, damaged or foreign, or the folder holds several layers.
    """
    found = _LAYER.fullmatch(path.name) if path.is_file() else None
    config = _config(path.parent if found else path)
    if not found and (count := _count(path)) != 1:
        raise CheckpointError(f"{path} holds {count} transcoders; name one of them: {path / 'layer_0.safetensors'}.")
    file, number = (path, int(found[1])) if found else (path / "layer_0.safetensors", 0)
    tensors = load_tensors(file)
    k = _k(file, config, tensors.pop("k", None))
    d_sae, d = sizes(tensors, "W_enc", 2)
    given = tensors.get(_THRESHOLD, torch.empty(0, dtype=torch.float32, device="cpu"))
    check_tensors(
        file,
        tensors,
        {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)},
        {_THRESHOLD: tuple(given.shape) if given.numel() == 1 else (d_sae,), "W_skip": (d, d)},
    )
    base = _base(file, config, tensors)
    if _THRESHOLD in tensors:
        tensors[_THRESHOLD] = given.expand(d_sae)
    values = of_one_dtype(tensors)
    if k > d_sae:
        raise CheckpointError(f"{file} is damaged: it has {d_sae} latents, and k is {k} in {_CONFIG}. {_FETCH}")
    values["W_enc_T"] = values.pop("W_enc")
    if base == "jump_relu":
        values["threshold"] = values.pop(_THRESHOLD)
    name = joined("skip_transcoder" if "W_skip" in values else "transcoder", base)
    settings = {"k": k} if base == "topk" else settings_of_reading(base, d_sae)
    return Content(name, settings, values, apply_b_dec_to_input=False, metadata=_metadata(config, number))


def _config(folder: Path) -> _Config:
    path = folder / _CONFIG
    config = parse(_Config, load_yaml(path, _FETCH), str(path), _FETCH)
    if config.model_kind == "cross_layer_transcoder":
        raise CheckpointError(
            f"{folder} holds a cross-layer transcoder, which FlashSAE has no architecture for: use circuit-tracer, or "
            "load transcoders of single layers."
        )
    if config.model_kind != "transcoder_set":
        raise CheckpointError(
            f"{path}: expected transcoder_set as model_kind, got {config.model_kind[:40]!r}. {_FETCH}"
        )
    if config.transcoders is not None and not _are_here(config.transcoders):
        raise CheckpointError(
            f"{path} lists transcoders at other places, which are not looked for: fetch the one that you want, and "
            "load it as what it is."
        )
    return config


def _are_here(transcoders: list[str]) -> bool:
    """Tell whether a list of files names those of layers in their order, which then lie beside it, wherever it says."""
    names = [each.partition("?")[0].rpartition("/")[2] for each in transcoders]
    return names == [f"layer_{number}.safetensors" for number in range(len(transcoders))]


def _count(folder: Path) -> int:
    """Return the number of layers, of which each must be there."""
    numbers = {int(found[1]) for path in folder.iterdir() if (found := _LAYER.fullmatch(path.name))}
    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if missing < max(numbers, default=0) or not numbers:
        raise CheckpointError(f"{folder} has no layer_{missing}.safetensors, and every layer must be there. {_FETCH}")
    return len(numbers)


def _k(file: Path, config: _Config, tensor: Tensor | None) -> int:
    """Return k of config.yaml or of the file, which must be the same; 0 where the activation is not topk."""
    told = None if tensor is None or tensor.numel() != 1 or tensor.is_floating_point() else int(tensor)
    if tensor is not None and (told is None or told < 1 or config.k not in (None, told)):
        raise CheckpointError(f"{file} is damaged: its k is not the one in {_CONFIG}, a number from 1 on. {_FETCH}")
    k = config.k or told
    if config.activation == "topk" and k is None:
        raise CheckpointError(f"{file}: the activation is topk, and there is no k in {_CONFIG}: write it there.")
    return (k or 0) if config.activation == "topk" else 0


def _base(file: Path, config: _Config, tensors: Mapping[str, Tensor]) -> str:
    activation, has_thresholds = config.activation, _THRESHOLD in tensors
    if activation not in (*_BY_FILE, "topk", "relu"):
        raise CheckpointError(
            f"{file}: expected topk, relu or jumprelu as the activation in {_CONFIG}, got {activation[:40]!r}."
        )
    if has_thresholds != (activation not in (None, "topk", "relu")) and activation is not None:
        raise CheckpointError(
            f"{file} is damaged: the activation in {_CONFIG} is {activation}, and there "
            f"{'are' if has_thresholds else 'are no'} thresholds. {_FETCH}"
        )
    if has_thresholds:
        check_threshold(file, tensors[_THRESHOLD])
    return activation if activation in ("topk", "relu") else "jump_relu" if has_thresholds else "relu"


def _metadata(config: _Config, number: int) -> dict[str, Any]:
    told = asdict(config)
    foreign = {name: told[name] for name in ("feature_input_hook", "feature_output_hook", "scan")}
    hooks, own = (config.feature_input_hook, config.feature_output_hook), dict(enumerate(config.hookpoints or ()))
    named = {
        "model": None if config.model_name is None else model_of(config.model_name),
        "hookpoint": own.get(number) or places_of(config.model_name, hooks, number),
    }
    return {
        **{name: value for name, value in named.items() if value is not None},
        NAME: {"layer": number, **{name: value for name, value in foreign.items() if value is not None}},
    }


def write(folder: Path, content: Content, lossy: bool = False) -> list[str]:
    """Write one transcoder, as that of a model of one layer; see `write_set`."""
    return write_set(folder, {str(content.metadata.get("hookpoint", "")): content}, lossy)


def write_set(folder: Path, contents: Mapping[str, Content], lossy: bool = False) -> list[str]:
    """Write the transcoders of all layers of a model.

    Args:
        folder: empty.
        contents: by hookpoint: one for each layer, from 0 on, all of one width and one number of latents.
        lossy: nothing is ever given up.
    Raises:
        ConfigError: it is no such set, or one of them is nothing that circuit-tracer has.
    """
    for content in contents.values():
        _check_held(content)
    ordered = by_layer(contents)
    sizes = sorted({(content.d_sae, content.d_in) for content in ordered})
    if len(sizes) > 1:
        told = " and ".join(f"{d_sae} latents of width {d}" for d_sae, d in sizes[:2])
        raise ConfigError(f"{NAME}: expected one size for all layers, got {told}: train them alike.")
    write_yaml(folder / _CONFIG, _config_of(ordered))
    for number, content in enumerate(ordered):
        atomic.save_tensors(folder / f"layer_{number}.safetensors", _tensors_of(content))
    return []


def _check_held(content: Content) -> None:
    selection = selection_of(content)
    if selection.outer not in ("transcoder", "skip_transcoder"):
        raise ConfigError(f"{NAME} holds transcoders alone, and this is {content.architecture}: {INSTEAD}")
    if selection.name not in ("topk", "threshold", "relu"):
        raise ConfigError(f"{NAME} has topk, jumprelu and relu, and this is {content.architecture}: {INSTEAD}")
    refuse_unset(content, selection, NAME)
    refuse_widths([content.d_in, content.d_out], NAME)
    refuse_normalization(content, NAME)


def _config_of(contents: list[Content]) -> dict[str, Any]:
    """Return what config.yaml says of the transcoders of all layers, which must be one thing."""
    selections = [selection_of(content) for content in contents]
    models = {content.metadata.get("model") for content in contents}
    kinds = {(each.name == "topk", each.k) for each in selections}
    hooks = {hooks_of(content) for content in contents}
    for what, found in (("model", models), ("k, or none with topk", kinds), ("pair of hooks", hooks)):
        if len(found) > 1:
            told = ", ".join(sorted(map(str, found))[:3])
            raise ConfigError(f"{NAME}: expected one {what} for all layers, got {told}: train them alike.")
    (model,), (reads, writes) = models, hooks.pop()
    config: dict[str, Any] = {
        "model_name": None if model is None else model_name_of(str(model)),
        "model_kind": "transcoder_set",
        "feature_input_hook": reads,
        "feature_output_hook": writes,
        "scan": kept_of(contents[0].metadata, NAME).get("scan"),
    }
    names = {each.name for each in selections}
    if names in ({"topk"}, {"relu"}):
        config["activation"] = names.pop()
    if config.get("activation") == "topk":
        config["k"] = selections[0].k
    places = [content.metadata.get("hookpoint") for content in contents]
    both = [f"{place}:in, {place}" if isinstance(place, str) and "," not in place else place for place in places]
    names_tell = both == [places_of(config["model_name"], (reads, writes), number) for number in range(len(both))]
    return config if None in places or names_tell else {**config, "hookpoints": places}


def _tensors_of(content: Content) -> dict[str, Tensor]:
    tensors, selection = subtracting(content, False).tensors, selection_of(content)
    written = {
        "W_enc": tensors["W_enc_T"], "W_dec": tensors["W_dec"], "b_enc": tensors["b_enc"], "b_dec": tensors["b_dec"]
    }  # fmt: skip
    if selection.threshold is not None:
        written[_THRESHOLD] = selection.threshold
    return written | ({"W_skip": tensors["W_skip"]} if "W_skip" in tensors else {})


FORMAT = Format(
    NAME,
    "circuit-tracer",
    detects,
    read,
    write,
    write_set,
    parts,
    is_whole=True,
    source="circuit-tracer 0.4.1, transcoder/single_layer_transcoder.py and utils/hf_utils.py",
)

"""The files of sparsify, which delphi reads too: cfg.json and sae.safetensors, in a folder named for its hookpoint.

    f = TopK(relu(encoder.weight @ (x − b_dec) + encoder.bias), k);   x_hat = f @ W_dec + b_dec (+ W_skip @ x)

With transcode nothing is subtracted, and x_hat is of the output of the module whose input x is. W_dec is [d_sae, d_in],
as ours. W_skip where b_dec is subtracted, which no architecture here has, is read with b_dec folded into b_enc. There
is no other selection, so what selects otherwise is written as TopK only where that is asked for; ReLU is TopK of all
latents, with the same numbers. `config.json` beside it says what it was trained on: theirs writes one for all SAEs of a
run, into the folder above, and ours one into the folder of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flashsae.errors import CheckpointError, ConfigError
from flashsae.files import atomic
from flashsae.files.documents import load_json, load_tensors
from flashsae.files.schema import Count, Size, parse
from flashsae.formats.checks import (
    active,
    check_alone,
    check_tensors,
    folder_name,
    glimpse,
    of_one_dtype,
    refuse_normalization,
    refuse_outer,
    refuse_widths,
    without_nan,
)
from flashsae.formats.content import Content, Format, kept_of
from flashsae.formats.folds import scaled, subtracting
from flashsae.formats.hook_names import is_hookpoint
from flashsae.formats.selection import joined, l0_of, selection_of, split
from flashsae.natural import in_order

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_NAME = "sparsify"
_ADVICE = "Save the SAE again."
_MULTI_TOPK = 0.125
"""The weight of the loss that `multi_topk` turns on. With it their forward returns the reconstruction from 4 · k
latents, also in inference, so it is written only where they wrote it."""
_ONLY_OURS = "flashsae"
_NAMES = {"model": ("model", str), "dataset": ("dataset", str), "ctx_len": ("context_length", int)}
"""Of what both know of a training: in theirs, in ours, and what it is."""


@dataclass(frozen=True)
class _Config:
    """The content of cfg.json, with what theirs takes for what is not there; `signed` is of its first versions."""

    d_in: Size
    k: Size = 32
    num_latents: Count = 0
    expansion_factor: Size = 32
    activation: Literal["topk", "groupmax"] = "topk"
    normalize_decoder: bool = True
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False
    signed: bool = False

    @property
    def architecture(self) -> str:
        outer = "skip_transcoder" if self.skip_connection else "transcoder" if self.transcode else ""
        return joined(outer, "abs_topk" if self.signed else "topk")


def detects(path: Path) -> bool:
    """Tell whether a folder holds an SAE of sparsify, or several."""
    return _is_one(path) or bool(parts(path))


def parts(path: Path) -> dict[str, Path]:
    """Return the SAEs in a folder by hookpoint, and seed where one has several: the folder of each; none of one."""
    found: dict[str, Path] = {}
    for folder in [] if _is_one(path) else _folders(path):
        inner = {f"{folder.name}/{each.name}": each for each in _folders(folder) if _is_one(each)}
        found |= {folder.name: folder} if _is_one(folder) else inner
    return found


def _folders(path: Path) -> list[Path]:
    try:
        return [path / name for name in in_order(each.name for each in path.iterdir() if each.is_dir())]
    except OSError:
        return []


def _is_one(path: Path) -> bool:
    """Tell whether a folder holds an SAE, or lacks no more of it than the weights."""
    try:
        config = glimpse(path / CONFIG)
        return (path / WEIGHTS).is_file() or ("num_latents" in config and "architecture" not in config)
    except OSError:
        return False


def read(path: Path) -> Content:
    """Return the SAE in a folder."""
    check_alone(path, parts(path))
    config = parse(_Config, load_json(path / CONFIG, _ADVICE), str(path / CONFIG), _ADVICE)
    d_in, d_sae = config.d_in, config.num_latents or config.d_in * config.expansion_factor
    if config.activation != "topk":
        raise CheckpointError(
            f"{path / CONFIG}: activation groupmax takes the largest latent of each of k groups, which no architecture "
            "of FlashSAE does: load it with sparsify."
        )
    k = active(path / CONFIG, config.k, d_sae)
    shapes: dict[str, tuple[int, ...]]
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"W_skip": (d_in, d_in)} if config.skip_connection else {}
    check_tensors(path / WEIGHTS, tensors := load_tensors(path / WEIGHTS), shapes)
    names = {"encoder.weight": "W_enc_T", "encoder.bias": "b_enc"}
    content = Content(
        architecture=config.architecture,
        settings={"k": k, **({"multi_topk": _MULTI_TOPK} if config.multi_topk and not config.signed else {})},
        tensors={names.get(name, name): tensor for name, tensor in of_one_dtype(tensors).items()},
        apply_b_dec_to_input=not config.transcode,
        metadata=_metadata(path, config),
    )
    return subtracting(content, False) if config.skip_connection else content


def _metadata(path: Path, config: _Config) -> dict[str, Any]:
    """Return what is known of the training, in our names, and under theirs what we have no names for."""
    content, folder = without_nan(_run_of(path)), path.absolute()
    name = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    hookpoints = content.get("hookpoints")
    is_named = isinstance(hookpoints, list) and name in hookpoints
    told: dict[str, Any] = {"hookpoint": name} if is_named or is_hookpoint(name) else {}
    for theirs, (ours, kind) in _NAMES.items():
        told |= {ours: content[theirs]} if type(content.get(theirs)) is kind else {}
    kept: dict[str, Any] = {
        "normalize_decoder": config.normalize_decoder,
        **({"multi_topk": True} if config.multi_topk else {}),
    }
    own = content.get(_ONLY_OURS)
    if isinstance(own, dict):
        return {**told, **own, _NAME: kept}
    rest = {name: value for name, value in content.items() if name not in ("sae", *_NAMES)}
    return {**told, _NAME: {**kept, **({RUN: rest} if rest else {})}}


def _run_of(path: Path) -> dict[str, Any]:
    """Return config.json in the folder of an SAE, or that of sparsify's in a folder above; {} where there is none."""
    own = path / RUN
    if own.exists():
        content = load_json(own, f"{_ADVICE} Or remove it.")
        if not isinstance(content, dict):
            raise CheckpointError(f"{own} is damaged: expected an object. {_ADVICE} Or remove it.")
        return content
    folder = path.absolute()
    shared = (glimpse(above / RUN) for above in (folder.parent, folder.parent.parent))
    return next((content for content in shared if isinstance(content.get("sae"), dict)), {})


def write(folder: Path, content: Content, lossy: bool) -> list[str]:
    """Write one SAE into a folder."""
    refuse_outer(content, _NAME, ("transcoder", "skip_transcoder"))
    refuse_normalization(content, _NAME)
    refuse_widths([content.d_in, content.d_out], _NAME)
    as_topk, told = _as_topk(content, lossy)
    outer = split(content.architecture)[0]
    folded = subtracting(as_topk, not outer)
    names = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias"}
    kept = ("W_enc_T", "b_enc", "W_dec", "b_dec", *(("W_skip",) if outer == "skip_transcoder" else ()))
    atomic.save_tensors(folder / WEIGHTS, {names.get(name, name): folded.tensors[name] for name in kept})
    theirs = kept_of(content.metadata, _NAME)
    config = _Config(
        d_in=content.d_in,
        k=folded.settings["k"],
        num_latents=content.d_sae,
        expansion_factor=max(1, content.d_sae // content.d_in),
        normalize_decoder=theirs.get("normalize_decoder", not outer) is True,
        multi_topk=theirs.get("multi_topk") is True,
        skip_connection=outer == "skip_transcoder",
        transcode=bool(outer),
    )
    settings = asdict(config)
    del settings["signed"]
    _write_json(folder / CONFIG, settings)
    _write_json(folder / RUN, _run(content, settings, kept_of(theirs, RUN)))
    return told


def _run(content: Content, settings: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of a run, in their names, and all that is known in ours."""
    metadata = content.metadata
    told = {name: metadata[ours] for name, (ours, _) in _NAMES.items() if metadata.get(ours) is not None}
    hookpoint = metadata.get("hookpoint")
    named = {"hookpoints": [hookpoint]} if isinstance(hookpoint, str) and "hookpoints" not in rest else {}
    own = {name: value for name, value in metadata.items() if name != _NAME}
    return {"sae": dict(settings), **rest, **told, **named, _ONLY_OURS: own}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic.storage_errors(path):
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_set(folder: Path, contents: Mapping[str, Content], lossy: bool) -> list[str]:
    """Write several SAEs into a folder, each into one of its own named as its hookpoint."""
    told = []
    for hookpoint, content in contents.items():
        name = folder_name(hookpoint)
        with atomic.storage_errors(folder / name):
            (folder / name).mkdir(parents=True)
        told += [f"{hookpoint}: {each}" for each in write(folder / name, content, lossy)]
    return told


_GIVEN_UP = {
    "batch_topk": "the k largest of each token are active, and not all above the threshold, which is left out",
    "jump_relu": "the k largest of each token are active, and not all above their thresholds, which are left out",
    "gated": "the k largest magnitudes of each token are active, and not all whose gate is open, which is left out",
    "abs_topk": "the k largest of each token are active, and not the k largest by magnitude: nothing is negative",
}


def _as_topk(content: Content, lossy: bool) -> tuple[Content, list[str]]:
    """Return an SAE with the settings of TopK, and what was given up for that."""
    title, inner = content.architecture, selection_of(content).base
    if inner == "topk":
        return content, []
    if inner == "relu":
        told = (
            f"{title} is TopK with k = d_sae = {content.d_sae}: the same numbers, but codes hold those that are 0, too"
        )
        return replace(content, settings={"k": content.d_sae}), [told]
    if inner not in _GIVEN_UP:
        raise ConfigError(f"sparsify holds TopK alone, and not {title}: keep it as flashsae.")
    k = l0_of(content)
    if not lossy:
        raise ConfigError(
            f"sparsify holds TopK alone, and not {title}: write saelens, or give --lossy (lossy=True), with which "
            f"{_GIVEN_UP[inner]}."
        )
    if k is None:
        raise ConfigError(f"sparsify holds TopK alone, and nothing says how many latents of {title} are active (l0).")
    tensors = dict(content.tensors)
    if inner == "gated":
        tensors["W_enc_T"] = scaled(tensors["W_enc_T"], tensors["r_mag"].double().exp())
        tensors["b_enc"] = tensors["b_mag"]
        del tensors["b_mag"], tensors["r_mag"]
    told = f"{title} is TopK with k = {k}: {_GIVEN_UP[inner]}"
    return replace(content, settings={"k": k}, tensors=tensors), [told]


FORMAT = Format(
    name=_NAME,
    title="sparsify",
    detects=detects,
    read=read,
    write=write,
    write_set=write_set,
    parts=parts,
    source="EleutherAI, eai-sparsify 1.3: sparsify/sparse_coder.py",
)

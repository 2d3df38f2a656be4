"""The files of dictionary_learning, which SAEBench reads too: ae.pt, a pickled dict of tensors, and config.json.

`trainer.dict_class` of config.json says what ae.pt holds. Decoders that are a layer of torch are [d, d_sae]:

    AutoEncoderTopK, BatchTopKSAE   encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
    MatryoshkaBatchTopKSAE          W_enc [d, d_sae], b_enc, W_dec [d_sae, d], b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder             W_enc [d, d_sae], b_enc, W_dec [d_sae, d], b_dec, threshold; x itself is encoded
    AutoEncoder                     encoder.weight, encoder.bias, decoder.weight, bias: ReLU
    AutoEncoderNew                  encoder.weight, encoder.bias, decoder.weight, decoder.bias: ReLU of x itself
    GatedAutoEncoder                encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias

Their loader gives the rows of an AutoEncoder's decoder norm 1, and so does reading here: activations are those that it
gives. SAEBench refuses other norms, so rows are written with norm 1 wherever that selects no other latents. A threshold
below 0, which it is until it is set, lets through what a ReLU does: it is read as 0.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning
from flashsae.files import atomic
from flashsae.files.documents import load_pickle
from flashsae.formats import dictionary_learning_config as layout
from flashsae.formats.checks import (
    active,
    check_alone,
    check_tensors,
    folder_name,
    number,
    of_one_dtype,
    refuse_normalization,
    refuse_outer,
    sizes,
)
from flashsae.formats.content import Content, Format, kept_of
from flashsae.formats.folds import norms, subtracting, with_unit_rows
from flashsae.formats.selection import selection_of, settings_of_reading
from flashsae.settings.prefixes import prefixes_of


@dataclass(frozen=True)
class _Kind:
    """A class of theirs.

    Args:
        architecture: ours.
        trainer_class: what trains it, by which SAEBench knows it.
        tensors: the names of its parameters, and ours. What they call W_enc and decoder.weight is [d, d_sae].
        subtracts: whether b_dec is subtracted from x.
        numbers: what else ae.pt holds.
    """

    architecture: str
    trainer_class: str
    tensors: Mapping[str, str]
    subtracts: bool = True
    numbers: tuple[str, ...] = ()


_LINEAR = {"encoder.weight": "W_enc_T", "decoder.weight": "W_dec"}
_PLAIN = {"W_enc": "W_enc_T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_TOPK = {**_LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}
_GATED = {**_LINEAR, "decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_enc", "mag_bias": "b_mag"}
_TRANSPOSED = ("W_enc", "decoder.weight")
_KINDS = {
    "AutoEncoderTopK": _Kind("topk", "TopKTrainer", _TOPK, numbers=("k", "threshold")),
    "BatchTopKSAE": _Kind("batch_topk", "BatchTopKTrainer", {**_TOPK, "threshold": "threshold"}, numbers=("k",)),
    "MatryoshkaBatchTopKSAE": _Kind("matryoshka", "MatryoshkaBatchTopKTrainer", _PLAIN, numbers=("k", "group_sizes")),
    "JumpReluAutoEncoder": _Kind("jump_relu", "JumpReluTrainer", _PLAIN, subtracts=False),
    "AutoEncoder": _Kind("relu", "StandardTrainer", {**_LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}),
    "AutoEncoderNew": _Kind(
        "relu", "StandardTrainer", {**_LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"}, subtracts=False
    ),
    "GatedAutoEncoder": _Kind("gated", "GatedSAETrainer", _GATED),
}
_UNSET = -1.0
"""The threshold of those that have none yet."""


def read(path: Path) -> Content:
    """Return the SAE of a folder, or of a checkpoint's file."""
    weights = layout.weights_of(path)
    if not weights.exists():
        check_alone(path, layout.parts(path))
    config = layout.config_of(weights)
    kind = _KINDS.get(config.trainer.dict_class)
    if kind is None:
        raise CheckpointError(
            f"{config.path}: dict_class: expected one of {', '.join(_KINDS)}, got "
            f"{ascii(config.trainer.dict_class)[:60]}; load it with dictionary_learning."
        )
    state = load_pickle(weights)
    d, d_sae = _widths(weights, state, kind, config)
    numbers = {name: state.pop(name, None) for name in kind.numbers}
    tensors = _parameters(weights, state, kind, d, d_sae)
    settings = _settings(weights, kind, numbers, config.trainer, d_sae)
    metadata = layout.metadata_of(config)
    content = Content(kind.architecture, settings, tensors, kind.subtracts, metadata=metadata)
    if config.trainer.dict_class == "AutoEncoder":
        content = with_unit_rows(content) or content
    if "threshold" in kind.numbers and (threshold := numbers["threshold"]) is not None:
        told = number(weights, "threshold", threshold)
        if 0 <= told < float("inf"):
            theirs = {**metadata.get(layout.NAME, {}), "threshold": told}
            return replace(content, metadata={**metadata, layout.NAME: theirs})
    return content


def _widths(weights: Path, state: Mapping[str, Any], kind: _Kind, config: layout.Config) -> tuple[int, int]:
    """Return d_in and d_sae, of the matrix of the encoder; -1 where there is none."""
    encoder = "W_enc" if "W_enc" in kind.tensors else "encoder.weight"
    rows, columns = sizes(state, encoder, 2)
    d_sae, d_in = (columns, rows) if encoder in _TRANSPOSED else (rows, columns)
    told = {"activation_dim": config.trainer.activation_dim or d_in, "dict_size": config.trainer.dict_size or d_sae}
    if d_in > 0 and told != {"activation_dim": d_in, "dict_size": d_sae}:
        raise CheckpointError(
            f"{config.path} is of another SAE: it says activation_dim {told['activation_dim']} and dict_size "
            f"{told['dict_size']}, and {encoder} in {weights.name} has {d_in} and {d_sae}. {layout.ADVICE}"
        )
    return d_in, d_sae


def _parameters(weights: Path, state: Mapping[str, Any], kind: _Kind, d: int, d_sae: int) -> dict[str, Tensor]:
    """Return the parameters in our names and shapes."""
    ours: dict[str, tuple[int, ...]] = {"W_enc_T": (d_sae, d), "W_dec": (d_sae, d), "b_dec": (d,)}
    ours["threshold"] = () if "k" in kind.numbers else (d_sae,)
    shapes = {theirs: ours.get(name, (d_sae,)) for theirs, name in kind.tensors.items()}
    shapes |= {name: shapes[name][::-1] for name in _TRANSPOSED if name in shapes}
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
        for name, value in state.items()
    }
    check_tensors(weights, tensors, shapes)
    renamed = {
        name: tensors[theirs].T if theirs in _TRANSPOSED else tensors[theirs] for theirs, name in kind.tensors.items()
    }
    if "threshold" in renamed:
        renamed["threshold"] = renamed["threshold"].clamp_min(0.0)
    return of_one_dtype(renamed)


def _settings(
    weights: Path, kind: _Kind, numbers: Mapping[str, Any], trainer: layout.Trainer, d_sae: int
) -> dict[str, Any]:
    """Return the settings of the architecture."""
    if kind.architecture == "jump_relu":
        return settings_of_reading("jump_relu", d_sae, trainer.target_l0)
    if "k" not in kind.numbers:
        return {}
    k = trainer.k if numbers["k"] is None else number(weights, "k", numbers["k"])
    if k is None:
        raise CheckpointError(f"{weights} has no k, and neither has config.json. {layout.ADVICE}")
    if trainer.k not in (None, k) and not layout.is_checkpoint(weights):  # k may have been annealed
        raise CheckpointError(f"{weights} is of another SAE than config.json: its k is {k:g}, not {trainer.k}.")
    settings: dict[str, Any] = {"k": active(weights, k, d_sae)}
    if "group_sizes" in kind.numbers:
        settings["prefixes"] = _prefixes(weights, numbers["group_sizes"], d_sae)
    return settings


def _prefixes(weights: Path, sizes: object, d_sae: int) -> list[float]:
    """Return where the groups of latents end."""
    is_whole = isinstance(sizes, Tensor) and sizes.dim() == 1 and sizes.dtype in (torch.int64, torch.int32)
    each = sizes.tolist() if isinstance(sizes, Tensor) and is_whole else []
    if not each or min(each) < 1 or sum(each) != d_sae:
        raise CheckpointError(
            f"{weights}: group_sizes: expected numbers of latents that sum to {d_sae}. {layout.ADVICE}"
        )
    return [float(end) for end in accumulate(each)]


def write(folder: Path, content: Content, lossy: bool) -> list[str]:
    """Write one SAE into a folder."""
    refuse_outer(content, layout.NAME)
    refuse_normalization(content, layout.NAME)
    dict_class, told = _class_for(content, lossy)
    kind = _KINDS[dict_class]
    folded = subtracting(content, kind.subtracts)
    with_norms = with_unit_rows(folded)
    if with_norms is None:
        of_rows = norms(content.tensors["W_dec"])
        warnings.warn(
            f"{content.architecture} is written with the norms that its decoder rows have, from {of_rows.min():.3g} to "
            f"{of_rows.max():.3g}, as with norm 1 it would select other latents: dictionary_learning takes it, and "
            "SAEBench, which refuses such rows, takes flashsae.saebench(sae).",
            FlashSAEWarning,
            stacklevel=2,
        )
    tensors = (with_norms or folded).tensors
    if selection_of(content).base == "jump_relu" and bool((tensors["threshold"] < 0).any()):
        given_up = "thresholds below 0 become 0, as there is a ReLU behind them"
        if not lossy:
            raise ConfigError(
                f"{layout.NAME} holds no {content.architecture} that lets values below 0 through: write flashsae, or "
                f"give --lossy (lossy=True), with which {given_up}."
            )
        told.append(given_up)
        tensors = {**tensors, "threshold": tensors["threshold"].clamp_min(0.0)}
    state = {
        name: tensors.get(ours, torch.zeros((), dtype=torch.float32, device="cpu"))
        for name, ours in kind.tensors.items()
    }
    state = {name: each.T.contiguous() if name in _TRANSPOSED else each.contiguous() for name, each in state.items()}
    _save(folder / layout.WEIGHTS, {**state, **_numbers(content, kind, state)})
    of_sae = {
        "trainer_class": kind.trainer_class,
        "dict_class": dict_class,
        "activation_dim": content.d_in,
        "dict_size": content.d_sae,
        **{name: content.settings[name] for name in ("k", "target_l0") if name in content.settings},
    }
    with atomic.storage_errors(folder / layout.CONFIG):
        text = json.dumps(layout.written(content.metadata, of_sae), indent=4)
        (folder / layout.CONFIG).write_text(text + "\n", "utf-8")
    return told


def _class_for(content: Content, lossy: bool) -> tuple[str, list[str]]:
    """Return which of their classes an SAE is, and what is given up for that."""
    inner = selection_of(content).base
    if inner == "abs_topk":
        given_up = "the k largest of each token are active, and not the k largest by magnitude: nothing is negative"
        if not lossy:
            raise ConfigError(
                f"{layout.NAME} holds no {content.architecture}: write saelens, or give --lossy (lossy=True), with "
                f"which {given_up}."
            )
        return "AutoEncoderTopK", [f"abs_topk is TopK: {given_up}"]
    is_nested = inner == "batch_topk" and content.architecture.startswith("matryoshka")
    wanted = "matryoshka" if is_nested else inner
    dict_class = next((name for name, kind in _KINDS.items() if kind.architecture == wanted), None)
    if dict_class is None:
        raise ConfigError(f"{layout.NAME} holds no {content.architecture}: keep it as flashsae.")
    return dict_class, []


def _numbers(content: Content, kind: _Kind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ae.pt holds beside parameters, of the dtypes of theirs."""
    numbers: dict[str, Tensor] = {}
    if "k" in kind.numbers:
        kept = kept_of(content.metadata, layout.NAME).get("threshold")
        unused = float(kept) if isinstance(kept, int | float) else _UNSET
        threshold = state.get("threshold", torch.tensor(unused, dtype=torch.float32, device="cpu"))
        is_wide = threshold.dtype == torch.float64
        numbers["k"] = torch.tensor(content.settings["k"], dtype=torch.int32, device="cpu")
        numbers["threshold"] = threshold.clone() if is_wide else threshold.float()
    if "group_sizes" in kind.numbers:
        ends = prefixes_of(content.settings["prefixes"], content.d_sae)
        numbers["group_sizes"] = torch.tensor(
            [end - start for start, end in pairwise([0, *ends])], dtype=torch.int64, device="cpu"
        )
    return numbers


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    with atomic.storage_errors(path), open(path, "wb") as file:
        torch.save(dict(state), file)


def write_set(folder: Path, contents: Mapping[str, Content], lossy: bool) -> list[str]:
    """Write several SAEs into a folder, as trainings at several submodules do: SUBMODULE/trainer_0."""
    told = []
    for hookpoint, content in contents.items():
        model = content.metadata.get("model")
        name = layout.submodule_of(hookpoint, model if isinstance(model, str) else None)
        submodule = folder / folder_name(name)
        place = next(place for i in count() if not (place := submodule / f"trainer_{i}").exists())
        with atomic.storage_errors(place):
            place.mkdir(parents=True)
        told += [f"{hookpoint}: {each}" for each in write(place, content, lossy)]
    return told


FORMAT = Format(
    name=layout.NAME,
    title="dictionary_learning",
    detects=layout.detects,
    read=read,
    write=write,
    write_set=write_set,
    parts=layout.parts,
    source="saprmarks/dictionary_learning: dictionary.py, trainers/*top_k.py and utils.load_dictionary",
)

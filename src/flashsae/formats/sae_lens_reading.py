"""What is read of SAELens: its tensors in our names, and which of our architectures they are of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import architecture_named, settings_of
from flashsae.errors import CheckpointError, FlashSAEError, FlashSAEWarning
from flashsae.files.documents import load_json, load_tensors
from flashsae.formats.checks import check_tensors
from flashsae.formats.content import Content, kept_of
from flashsae.formats.folds import divided, norms, scaled
from flashsae.formats.sae_lens_config import ADVICE, BATCHED, CONFIG_FILE, TRANSCODERS, SAELensConfig, read_config
from flashsae.formats.sae_lens_metadata import (
    KEPT,
    NORMALIZED,
    OURS,
    RESHAPED,
    SCALED,
    numbers_of,
    ours_of,
    reshaped_for,
    theirs_of,
)
from flashsae.formats.selection import joined, name_of, settings_of_reading, split
from flashsae.settings.kinds import as_json

WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE, SPARSITY = "sparsity.safetensors", "sparsity"
DENSITY = "latent_density"
FLOOR = 1e-10
"""What SAELens adds to densities before it takes their logarithm."""
FORMS = {
    ("", "topk"): "topk",
    ("", "abs_topk"): "abstopk",
    ("", "threshold"): "jumprelu",
    ("", "relu"): "standard",
    ("", "gated"): "gated",
    ("transcoder", "relu"): "transcoder",
    ("transcoder", "threshold"): "jumprelu_transcoder",
    ("skip_transcoder", "relu"): "skip_transcoder",
    ("skip_transcoder", "threshold"): "jumprelu_skip_transcoder",
}
"""SAELens's architectures, by what is around a selection, and the selection: `flashsae.formats.selection`."""
_NORMALIZATIONS = {"layer_norm": "layer_norm", "constant_norm_rescale": "token_norm"}
_TARGET_L0 = 32.0


def read_folder(folder: Path) -> Content:
    """Return the SAE in a folder, or that of a training which was not ended.

    Raises:
        CheckpointError: a file is missing or damaged, or the SAE is one that is not held here.
    """
    config = read_config(folder / CONFIG_FILE)
    values = _in_our_names(_tensors(folder / WEIGHTS_FILE, config), config)
    _tell_of_scaling(folder, config)
    block = kept_of(config.metadata, OURS)
    architecture, settings = _own(config, values, block) or _trained_as(config, values)
    if split(architecture)[1] == "batch_topk":
        values["threshold"] = values["threshold"][0].clone()
    table = {row.name for row in architecture_named(architecture).parameters if row.saved and not row.shape}
    numbers = numbers_of(block, values["W_dec"])
    content = Content(
        architecture,
        settings,
        {**{name: numbers[name] for name in table & numbers.keys() - values.keys()}, **values},
        config.apply_b_dec_to_input,
        _normalization(config, folder),
        extras=_extras(folder / SPARSITY_FILE, config.d_sae),
    )
    return replace(content, metadata=_metadata(content, config, block))


def _metadata(content: Content, config: SAELensConfig, block: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known in our names, and what SAELens knows under its name, unless that is from ours alone."""
    theirs = {name: value for name, value in config.metadata.items() if name != OURS}
    if config.reshape_activations != reshaped_for(theirs):
        theirs[RESHAPED] = config.reshape_activations
    if config.normalize_activations == SCALED:
        theirs[NORMALIZED] = SCALED
    ours = block.get("metadata")
    if not isinstance(ours, Mapping):
        return {**ours_of(theirs, is_transcoder=config.architecture in TRANSCODERS), KEPT: theirs}
    again = theirs_of(replace(content, metadata=ours))
    is_ours = {**again, OURS: None} == {**theirs, OURS: None}
    return dict(ours) if is_ours else {**ours, KEPT: theirs}


def _tensors(path: Path, config: SAELensConfig) -> dict[str, Tensor]:
    """Return the tensors in SAELens's names, in the dtype that SAELens casts them to."""
    tensors = load_tensors(path)
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp()
    W_dec = tensors.get("W_dec")
    d_in, d_sae = config.d_in, config.d_sae
    d_out = config.d_out or d_in
    if config.architecture in TRANSCODERS and config.d_out is None and W_dec is not None and W_dec.dim() == 2:
        d_out = W_dec.shape[1]
    biases = ("b_gate", "b_mag", "r_mag") if config.architecture == "gated" else ("b_enc",)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(biases, (d_sae,))
    if config.architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    if config.architecture in BATCHED:
        shapes["topk_threshold"] = ()
    if "skip" in config.architecture:
        shapes["W_skip"] = (d_out, d_in)
    check_tensors(path, tensors, shapes, {"scaling_factor": (d_sae,)})
    dtype = tensors["W_dec"].dtype if config.dtype is None else getattr(torch, config.dtype)
    wide = ("threshold", "topk_threshold")  # folds are of what the file holds, and rounded once
    return {name: tensor if name in wide else tensor.to(dtype) for name, tensor in tensors.items()}


def _in_our_names(tensors: Mapping[str, Tensor], config: SAELensConfig) -> dict[str, Tensor]:
    W_dec = tensors["W_dec"]
    values = {"W_enc_T": tensors["W_enc"].T.contiguous(), "W_dec": W_dec, "b_dec": tensors["b_dec"]}
    if config.architecture == "gated":
        values |= {"b_enc": tensors["b_gate"], "r_mag": tensors["r_mag"], "b_mag": tensors["b_mag"]}
    else:
        values["b_enc"] = tensors["b_enc"]
    if "W_skip" in tensors:
        values["W_skip"] = tensors["W_skip"]
    if "threshold" in tensors:  # a pre-activation below 0 is cut by a ReLU before it is compared
        values["threshold"] = tensors["threshold"].clamp_min(0).to(W_dec.dtype)
    if "topk_threshold" in tensors:
        values["threshold"] = tensors["topk_threshold"].to(W_dec.dtype).expand(config.d_sae).contiguous()
    if config.rescale_acts_by_decoder_norm:
        values = divided(values, norms(W_dec))
    factor = tensors.get("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        if not config.finetuning_scaling_factor:
            raise CheckpointError(
                f"{WEIGHTS_FILE} is damaged: it has a scaling_factor, and finetuning_scaling_factor in {CONFIG_FILE} "
                f"says that there is none. {ADVICE}"
            )
        values["W_dec"] = scaled(values["W_dec"], factor.double())
    return values


def _own(config: SAELensConfig, values: Mapping[str, Tensor], block: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the architecture and settings that an SAE of ours had, where what is kept of it fits what is there."""
    name, settings = block.get("architecture"), block.get("settings")
    if not isinstance(name, str) or len(name) > 80 or not isinstance(settings, Mapping):
        return None
    outer, base = split(name)
    if FORMS.get((outer, name_of(base))) != config.architecture:
        return None
    if (base == "batch_topk" and not _is_one(values["threshold"])) or (
        "topk" in config.architecture and settings.get("k") != config.k
    ):
        return None
    try:
        return name, as_json(asdict(settings_of(name, **settings)))
    except FlashSAEError:
        return None


def _trained_as(config: SAELensConfig, values: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return the architecture that an SAE of SAELens is of here, and its settings, as far as they are known."""
    form = config.architecture
    if form in BATCHED:
        return _batched(form, config, {"k": config.k, "matryoshka_widths": config.matryoshka_widths})
    outer, selection = next(key for key, name in FORMS.items() if name == form)
    if selection != "threshold":
        return joined(outer, selection), {"k": config.k} if form in ("topk", "abstopk") else {}
    trained, details = (config.metadata.get(f"training_architecture{end}") for end in ("", "_details"))
    if not outer and trained in BATCHED and isinstance(details, Mapping) and _is_one(values["threshold"]):
        return _batched(trained, config, details)
    l0 = config.metadata.get("l0")
    known = l0 if isinstance(l0, int | float) and 0 < l0 <= config.d_sae else None
    return joined(outer, "jump_relu"), settings_of_reading("jump_relu", config.d_sae, known)


def _batched(trained: str, config: SAELensConfig, details: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    k, widths = details.get("k"), details.get("matryoshka_widths") or config.matryoshka_widths
    if not (isinstance(k, int | float) and 0 < k < math.inf):
        k = _TARGET_L0
    settings: dict[str, Any] = {"k": min(config.d_sae, max(1, round(k)))}
    if trained == BATCHED[0] or not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return "batch_topk", settings
    inner = [width for width in widths if 0 < width < config.d_sae]
    return "matryoshka", {**settings, "prefixes": [float(width) for width in [*sorted(set(inner)), config.d_sae]]}


def _is_one(threshold: Tensor) -> bool:
    return bool((threshold == threshold[0]).all())


def _normalization(config: SAELensConfig, folder: Path) -> str:
    normalization = _NORMALIZATIONS.get(config.normalize_activations, "none")
    if normalization != "none" and config.architecture in TRANSCODERS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: normalize_activations is {config.normalize_activations} of a transcoder, which "
            "SAELens does to the input and does not undo of the output; FlashSAE has no such SAE."
        )
    return normalization


def _tell_of_scaling(folder: Path, config: SAELensConfig) -> None:
    """Refuse, or tell of, a scale of activations that the weights are for, and that SAELens does not apply either."""
    if config.normalize_activations == "covariance_whitening":
        raise CheckpointError(
            f"{folder} is of a training that was not ended, of whitened activations: SAELens folds the whitening into "
            "the weights at the end. Read what it saved then."
        )
    if config.normalize_activations != SCALED:
        return
    path, advice = folder / "activation_scaler.json", "√d_in over the mean norm of activations"
    if path.exists():
        content = load_json(path, ADVICE)
        factor = content.get("scaling_factor") if isinstance(content, dict) else None
        advice = f"{factor:g}" if isinstance(factor, int | float) else advice
    warnings.warn(
        f"{folder} is for activations of mean norm √d_in, and says so by {SCALED}: FlashSAE, as "
        "SAELens, takes activations as they come. sae.rescaled(factor) makes the SAE for these; the factor is "
        f"{advice}.",
        FlashSAEWarning,
        stacklevel=4,
    )


def _extras(path: Path, d_sae: int) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    tensors = load_tensors(path)
    check_tensors(path, tensors, {SPARSITY: (d_sae,)})
    return {DENSITY: (10 ** tensors[SPARSITY].double() - FLOOR).clamp_min(0).float()}

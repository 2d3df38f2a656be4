"""SAELens: cfg.json says what sae_weights.safetensors holds.

    pre_acts = (x − b_dec) @ W_enc + b_enc     b_dec is subtracted where apply_b_dec_to_input says so
    topk       relu of the k largest            abstopk    the k largest by magnitude
    jumprelu   relu(pre_acts) · H(pre_acts − threshold)
    gated      relu(exp(r_mag) · raw + b_mag) · H(raw + b_gate),   raw = (x − b_dec) @ W_enc

The same as ours, with W_enc as the field writes it. BatchTopK and Matryoshka are in inference latents above a
threshold, and so are jumprelu there; what they were trained as stands in the metadata. Where
rescale_acts_by_decoder_norm is set, latents and their selection are those of decoder rows of norm 1, which is folded.

Source: sae-lens 6.54, saes/topk_sae.py, jumprelu_sae.py, gated_sae.py, transcoder.py, and load_from_disk of sae.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.files import atomic
from flashsae.formats.content import Content, Format, kept_of, plain_metadata
from flashsae.formats.sae_lens_config import CONFIG_FILE
from flashsae.formats.sae_lens_metadata import KEPT, NORMALIZED, RESHAPED, SCALED, reshaped_for, theirs_of
from flashsae.formats.sae_lens_reading import DENSITY, FLOOR, FORMS, SPARSITY, SPARSITY_FILE, WEIGHTS_FILE, read_folder
from flashsae.formats.selection import Selection, selection_of

_NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "token_norm": "constant_norm_rescale"}
_DEEPEST = 3
"""Levels of folders below one that holds several SAEs, at most: release, layer, size."""


def detects(path: Path) -> bool:
    """Tell whether a folder, or a file of one, is an SAE of SAELens, or whether a folder has such folders in it."""
    return _is_one(_folder_of(path)) or bool(parts(path))


def read(path: Path) -> Content:
    """Read an SAE, or that of a training which was not ended.

    Args:
        path: of its folder, or of one of its files.
    Raises:
        CheckpointError: a file is missing or damaged, or the SAE is one that is not held here.
    """
    return read_folder(_folder_of(path))


def _folder_of(path: Path) -> Path:
    return path.parent if path.name in (CONFIG_FILE, WEIGHTS_FILE) else path


def parts(path: Path) -> dict[str, Path]:
    """Return the SAEs in the folders of a folder by their paths in it, as in a repository of a release."""
    if _is_one(path) or not os.path.isdir(path):
        return {}
    found: dict[str, Path] = {}
    for root, folders, names in os.walk(path):
        here = Path(root)
        name = here.relative_to(path)
        folders[:] = sorted(folders) if len(name.parts) < _DEEPEST else []
        if CONFIG_FILE in names and WEIGHTS_FILE in names:
            found[name.as_posix()] = here
            folders[:] = []
    return found


def _is_one(path: Path) -> bool:
    return all(os.path.isfile(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def write(folder: Path, content: Content, lossy: bool = False) -> list[str]:
    """Write an SAE as SAELens reads it.

    Args:
        folder: empty.
        content: the SAE.
        lossy: let thresholds below 0 be 0, and leave out what is known of latents beside their density.
    Returns:
        a sentence for each thing that was given up.
    Raises:
        ConfigError: SAELens has no such SAE, or not all that is known of this one.
        StorageError: the file system refused.
    """
    selection = selection_of(content)
    form = FORMS.get((selection.outer, selection.name))
    if form is None or (selection.name == "threshold" and selection.threshold is None):
        raise ConfigError(_refusal(content, selection))
    if selection.outer and content.apply_b_dec_to_input:
        raise ConfigError(
            "apply_b_dec_to_input: SAELens subtracts no b_dec from the input of a transcoder, and this one does."
        )
    tensors, given_up = _tensors(content, selection.threshold, form), []
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        given_up.append("thresholds below 0 became 0, since SAELens has a ReLU before them")
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
    others = sorted(content.extras.keys() - {DENSITY})
    if others:
        given_up.append(
            f"what is known of latents as {', '.join(others)} was left out, since SAELens has no place for it"
        )
    if given_up and not lossy:
        raise ConfigError(
            f"SAELens cannot hold all of this SAE: {'; '.join(given_up)}. --lossy, or lossy=True, writes it so."
        )
    text = json.dumps(plain_metadata(_config(content, form, selection.k)), indent=2)
    atomic.save_tensors(folder / WEIGHTS_FILE, tensors)
    if DENSITY in content.extras:
        density = content.extras[DENSITY].double()
        atomic.save_tensors(folder / SPARSITY_FILE, {SPARSITY: (density + FLOOR).log10().float()})
    with atomic.storage_errors(folder):
        (folder / CONFIG_FILE).write_text(f"{text}\n", "utf-8")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in given_up]


def _refusal(content: Content, selection: Selection) -> str:
    """Return why SAELens cannot hold an SAE, and what to do."""
    if selection.outer == "crosscoder":
        reason = "it has no SAE of several sites; the format flashsae holds it"
    elif selection.outer and selection.name == "topk":
        reason = (
            "its transcoders have a ReLU or thresholds, and no TopK; the formats sparsify and circuit_tracer hold it"
        )
    elif selection.base == "batch_topk":
        reason = "latents are above a threshold there, and this SAE has none; train it with FlashSAE, which finds one"
    else:
        known = ", ".join(sorted({" ".join(filter(None, key)).replace("_", " ") for key in FORMS}))
        reason = f"it has {known}; the format flashsae holds any"
    return f"arch: SAELens cannot hold an SAE of the architecture {content.architecture}: {reason}."


def _tensors(content: Content, threshold: Tensor | None, form: str) -> dict[str, Tensor]:
    ours: Mapping[str, Tensor] = content.tensors
    tensors = {"W_enc": ours["W_enc_T"].T.contiguous(), "W_dec": ours["W_dec"], "b_dec": ours["b_dec"]}
    if form == "gated":
        tensors |= {"b_gate": ours["b_enc"], "r_mag": ours["r_mag"], "b_mag": ours["b_mag"]}
    else:
        tensors["b_enc"] = ours["b_enc"]
    if threshold is not None:
        tensors["threshold"] = threshold
    if "W_skip" in ours:
        tensors["W_skip"] = ours["W_skip"]
    return tensors


def _config(content: Content, form: str, k: int) -> dict[str, Any]:
    """Return what stands in cfg.json; all that SAELens knows of an SAE is said, and nothing left to its defaults."""
    metadata = theirs_of(content)
    kept = kept_of(content.metadata, KEPT)
    normalization = _NORMALIZATIONS[content.normalize_activations]
    if normalization == "none" and kept.get(NORMALIZED) == SCALED:
        normalization = SCALED
    return {
        "architecture": form,
        "d_in": content.d_in,
        "d_sae": content.d_sae,
        **({"d_out": content.d_out} if "transcoder" in form else {}),
        **({"k": k or content.settings["k"], "rescale_acts_by_decoder_norm": False} if "topk" in form else {}),
        "dtype": str(content.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": content.apply_b_dec_to_input,
        "normalize_activations": normalization,
        "reshape_activations": "none" if kept.get(RESHAPED) == "none" else reshaped_for(metadata),
        "metadata": metadata,
    }


FORMAT = Format(
    "saelens",
    "SAELens",
    detects,
    read,
    write,
    parts=parts,
    source="sae-lens 6.54: github.com/decoderesearch/SAELens",
)

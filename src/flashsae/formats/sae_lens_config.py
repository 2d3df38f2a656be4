"""The cfg.json of SAELens, of all its versions, as one checked value.

Files of before version 6 have other names for the same, and leave out what was always so; the values that are put in
their place are those that SAELens puts there itself.

Source: sae-lens 6.54, loading/pretrained_sae_loaders.py, handle_pre_6_0_config; saes/sae.py, SAEConfig.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json
from flashsae.files.schema import Positive, Range, Size, parse

CONFIG_FILE = "cfg.json"
ADVICE = "Fetch or save it again."
_FIRST_OF_NOW = 6
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_METADATA = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip
"""What stood beside the rest before version 6, and is of the model and the training."""

SPARSE = ("topk", "abstopk")
BATCHED = ("batchtopk", "matryoshka_batchtopk")
"""Of trainings that were not ended: an SAE of these is saved as jumprelu."""
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_KNOWN = ("standard", "gated", "jumprelu", *SPARSE, *BATCHED, *TRANSCODERS)
_NOT_HELD = {
    "matching_pursuit": "its latents are chosen one after the other, each by what the others left over",
    "temporal": "its codes depend on the tokens before",
}
_Rows = Annotated[int, Range(1, 2**31 - 1)]


@dataclass(frozen=True)
class SAELensConfig:
    """What cfg.json says, in SAELens's words.

    Args:
        architecture: one of those that are read.
        d_in, d_sae, d_out: sizes; d_out of transcoders alone, None where it is not said.
        dtype: that weights are cast to when they are loaded; None: as they are.
        k: of the architectures that have one.
        rescale_acts_by_decoder_norm: whether selection and values are those of decoder rows of norm 1.
        matryoshka_widths: of a training that was not ended.
        metadata: of the model and the training.
    """

    architecture: str
    d_in: _Rows
    d_sae: _Rows
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    d_out: _Rows | None = None
    k: Size | Positive = 100
    rescale_acts_by_decoder_norm: bool = False
    finetuning_scaling_factor: bool = False
    apply_b_dec_to_input: bool = True
    normalize_activations: Literal[
        "none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"
    ] = "none"
    reshape_activations: Literal["none", "hook_z"] = "none"
    matryoshka_widths: list[int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> SAELensConfig:
    """Return what a cfg.json says.

    Raises:
        CheckpointError: it is damaged, or of an SAE that is not held here.
    """
    content = load_json(path, ADVICE)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: expected an object, got a {type(content).__name__}. {ADVICE}")
    if not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(f"{path} is damaged: metadata: expected an object. {ADVICE}")
    content = _upgraded(content, path) if _is_old(content, path) else content
    _check_architecture(content.get("architecture"), path)
    return parse(SAELensConfig, _completed(content, path), str(path), ADVICE)


def _is_old(content: dict[str, Any], path: Path) -> bool:
    version = content.get("sae_lens_version") or content.get("metadata", {}).get("sae_lens_version")
    if version is None:
        return True
    found = re.match(r"v?(\d{1,9})(?=\D|$)", version) if isinstance(version, str) else None
    if found is None:
        raise CheckpointError(f"{path} is damaged: sae_lens_version: expected one, got {str(version)[:40]!r}. {ADVICE}")
    return int(found[1]) < _FIRST_OF_NOW


def _upgraded(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a file from before version 6 as a file of now has it."""
    content = {_OLD_NAMES.get(name, name): value for name, value in content.items()}
    activation, settings = content.get("activation_fn") or "relu", content.get("activation_fn_kwargs") or {}
    if content.get("architecture") is None:
        content["architecture"] = "standard"
    if activation == "topk" and isinstance(settings, dict) and settings.get("k") is not None:
        content |= {"architecture": "topk", "k": settings["k"]}
    elif activation != "relu":
        what = "topk without a k" if activation == "topk" else str(activation)[:40]
        raise CheckpointError(
            f"{path}: its activation_fn is {what}, which SAELens reads as relu since version 6, and nobody knows "
            "whether that is what was trained: set it to relu in a copy if it is."
        )
    if isinstance(content.get("normalize_activations"), bool):
        content["normalize_activations"] = "expected_average_only_in" if content["normalize_activations"] else "none"
    if "reshape_activations" not in content:
        is_z = "hook_z" in str(content.get("hook_name", ""))
        content["reshape_activations"] = "hook_z" if is_z else "none"
    outside = {name: content[name] for name in _METADATA if name in content}
    return {**content, "metadata": {"prepend_bos": True, **content.get("metadata", {}), **outside}}


def _completed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return content with the defaults that depend on the architecture, and without what it does not have."""
    content = dict(content)
    architecture = content["architecture"]
    if content.get("normalize_activations") is None:
        content["normalize_activations"] = "none"
    if isinstance(content.get("dtype"), str):
        content["dtype"] = content["dtype"].removeprefix("torch.")
    if architecture in BATCHED:
        content.setdefault("rescale_acts_by_decoder_norm", True)
    elif architecture not in SPARSE:
        content |= {"k": 1, "rescale_acts_by_decoder_norm": False}
    if architecture in TRANSCODERS:
        if content.setdefault("apply_b_dec_to_input", False) is True:
            raise CheckpointError(
                f"{path} is damaged: apply_b_dec_to_input: expected false of a transcoder, whose b_dec is of its "
                f"output, got true. {ADVICE}"
            )
    else:
        content.pop("d_out", None)
    if architecture in SPARSE and not isinstance(content.get("k", 100), int):
        raise CheckpointError(f"{path} is damaged: k: expected a whole number, got {str(content['k'])[:40]}. {ADVICE}")
    try:  # SAELens writes figures that are no numbers as NaN, which no JSON has
        content["metadata"] = json.loads(json.dumps(content.get("metadata", {})), parse_constant=lambda _: None)
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: it is nested too deeply. {ADVICE}") from error
    return content


def _check_architecture(architecture: Any, path: Path) -> None:
    if not isinstance(architecture, str):
        got = "nothing" if architecture is None else str(architecture)[:40]
        raise CheckpointError(f"{path} is damaged: architecture: expected a name, got {got}. {ADVICE}")
    if architecture in _NOT_HELD:
        raise CheckpointError(
            f"{path} is of an SAE of the architecture {architecture}, which FlashSAE does not have: "
            f"{_NOT_HELD[architecture]}. Use it with SAELens."
        )
    if architecture not in _KNOWN:
        raise CheckpointError(
            f"{path}: architecture: expected one of {', '.join(_KNOWN)}, got {architecture[:40]!r}. An architecture of "
            "your own is used with the SAELens that it is registered in."
        )

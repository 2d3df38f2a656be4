"""Llama Scope: SAEs and transcoders of Llama 3.1, hyperparams.json and checkpoints/final.safetensors.

    z = s_in · encoder.weight @ x + encoder.bias,   s = √d_model / mean norm of activations, in and out
    f = relu(z) · H(z − s_in · jump_relu_threshold);   x_hat = (decoder.weight @ f + decoder.bias) / s_out

They were trained as TopK, of latents weighted with the norms of their decoders, and saved with decoders of norm 1; then
a threshold took the place of k, which stands there in units of activations as they come. The scales are folded into the
weights. Those of the transcoders differ, as they are of the input and of the output of an MLP.

Source: He et al. 2024 (Llama Scope), section 3; OpenMOSS/Language-Model-SAEs of October and December 2024, sae.py and
post_processing.py; sae-lens 6.54, loading/pretrained_sae_loaders.py, which folds the same.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_json, load_tensors
from flashsae.files.schema import Finite, Positive, Size, parse
from flashsae.formats.checks import check_finite, check_tensors, of_one_dtype, sizes
from flashsae.formats.content import Content, Format
from flashsae.formats.folds import divided, norms, scaled
from flashsae.formats.hook_names import hookpoints_of
from flashsae.formats.released import hooks_for_others, jump_relu, known, place_of
from flashsae.formats.selection import joined

_CONFIG, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_MODEL_FILE = "lm_config.json"
_ADVICE = "Fetch it again."
_NAMES = {"encoder.weight": "W_enc_T", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}


@dataclass(frozen=True)
class _Config:
    """What hyperparams.json says."""

    d_model: Size
    hook_point_in: str
    hook_point_out: str | None = None
    d_sae: Size | None = None
    act_fn: Literal["jumprelu", "topk", "relu"] = "jumprelu"
    jump_relu_threshold: Finite = 0.0
    top_k: Size = 50
    norm_activation: Literal["dataset-wise", "token-wise", "batch-wise", "inference", "none"] = "dataset-wise"
    dataset_average_activation_norm: dict[str, Positive] | None = None
    sparsity_include_decoder_norm: bool = True
    use_decoder_bias: bool = True
    apply_decoder_bias_to_pre_encoder: bool = False
    use_glu_encoder: bool = False


def detects(path: Path) -> bool:
    """Tell whether a folder has a hyperparams.json, or a file is the weights beside one."""
    return os.path.isfile(_folder(path) / _CONFIG)


def _folder(path: Path) -> Path:
    """Return the folder of an SAE, also of its weights or of the folder that they lie in."""
    whole = path.absolute()
    for inside, folder in ((_WEIGHTS, whole.parents[1:2]), (_WEIGHTS.split("/")[0], whole.parents[:1])):
        if whole.as_posix().endswith(f"/{inside}") and folder and os.path.isfile(folder[0] / _CONFIG):
            return folder[0]
    return path


def read(path: Path) -> Content:
    """Return what a folder holds."""
    folder = _folder(path)
    file = folder / _WEIGHTS
    config = parse(_Config, load_json(folder / _CONFIG, _ADVICE), str(folder / _CONFIG), _ADVICE)
    is_transcoder = config.hook_point_out not in (None, config.hook_point_in)
    _check(folder / _CONFIG, config, is_transcoder=is_transcoder)
    weights = load_tensors(file)
    if not config.use_decoder_bias:
        weights["decoder.bias"] = torch.zeros(config.d_model, dtype=torch.float32, device="cpu")
    F, d = config.d_sae or sizes(weights, "encoder.bias", 1)[0], config.d_model
    check_tensors(file, weights, dict(zip(_NAMES, [(F, d), (F,), (d, F), (d,)])))
    check_finite(file, weights)
    tensors = {_NAMES[name]: tensor for name, tensor in of_one_dtype(weights).items()}
    tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    s_in, s_out = _scales(folder / _CONFIG, config)
    dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)  # which a product needs, and a threshold
    factors = {"W_enc_T": s_in, "b_enc": 1.0, "W_dec": 1 / s_out, "b_dec": 1 / s_out}
    return _selecting(
        config,
        {name: scaled(tensor, factors[name], dtype=dtype) for name, tensor in tensors.items()},
        s_in,
        "transcoder" if is_transcoder else "",
        _metadata(folder, config),
    )


def _selecting(
    config: _Config, tensors: dict[str, Tensor], s_in: float, outer: str, metadata: dict[str, Any]
) -> Content:
    """Return an SAE with the selection that it has in inference: by a threshold, even if trained as TopK."""
    is_topk = config.act_fn == "topk" and config.jump_relu_threshold <= 0
    normalization = "token_norm" if config.norm_activation == "token-wise" else "none"
    subtracts = config.apply_decoder_bias_to_pre_encoder
    if config.act_fn != "relu" and not is_topk:
        threshold = torch.full_like(tensors["b_enc"], config.jump_relu_threshold * s_in)
        content = jump_relu({**tensors, "threshold": threshold}, outer, config.top_k, metadata)
        return replace(content, apply_b_dec_to_input=subtracts, normalize_activations=normalization)
    if is_topk and config.sparsity_include_decoder_norm:
        tensors = divided(tensors, norms(tensors["W_dec"]))
    return Content(
        architecture=joined(outer, "topk" if is_topk else "relu"),
        settings={"k": config.top_k} if is_topk else {},
        tensors=tensors,
        apply_b_dec_to_input=subtracts,
        normalize_activations=normalization,
        metadata=metadata,
    )


def _check(path: Path, config: _Config, *, is_transcoder: bool) -> None:
    """Raise CheckpointError on what no SAE of ours does."""
    wrong = None
    if config.use_glu_encoder:
        wrong = "use_glu_encoder multiplies latents with gates, which no architecture of FlashSAE does"
    elif config.apply_decoder_bias_to_pre_encoder and is_transcoder:
        wrong = "apply_decoder_bias_to_pre_encoder subtracts the bias of the output from the input of a transcoder"
    elif config.norm_activation == "token-wise" and is_transcoder:
        wrong = "norm_activation token-wise divides the output of a transcoder by its own norm, which nothing tells"
    elif config.norm_activation == "batch-wise":
        wrong = "norm_activation batch-wise makes the codes of a token depend on the tokens beside it"
    if wrong:
        raise CheckpointError(f"{path} is not read: {wrong}. Use it with the library that it was trained with.")
    if config.act_fn == "topk" and config.d_sae and config.top_k > config.d_sae:
        raise CheckpointError(f"{path} is damaged: top_k is {config.top_k} of {config.d_sae} latents. {_ADVICE}")


def _scales(path: Path, config: _Config) -> tuple[float, float]:
    """Return what activations are multiplied with, in and out."""
    if config.norm_activation != "dataset-wise":
        return 1.0, 1.0
    norms = config.dataset_average_activation_norm
    if norms is None or not {"in", "out"} <= norms.keys():
        raise CheckpointError(
            f"{path} is damaged: norm_activation dataset-wise needs dataset_average_activation_norm with in and out. "
            f"{_ADVICE}"
        )
    return math.sqrt(config.d_model) / norms["in"], math.sqrt(config.d_model) / norms["out"]


def _metadata(folder: Path, config: _Config) -> dict[str, Any]:
    model = None
    if (folder / _MODEL_FILE).exists():
        told = load_json(folder / _MODEL_FILE, _ADVICE)
        model = told.get("model_name") if isinstance(told, dict) else None
    if not isinstance(model, str):
        model = "meta-llama/Llama-3.1-8B" if re.search(r"Llama3_1-8B-Base-L", place_of(folder)) else None
    sites = dict.fromkeys(each for each in (config.hook_point_in, config.hook_point_out) if each is not None)
    hookpoint = hookpoints_of(list(sites), model)
    own = known(
        hook_point_in=config.hook_point_in,
        hook_point_out=config.hook_point_out,
        top_k=config.top_k,
        dataset_average_activation_norm=config.dataset_average_activation_norm,
    )
    theirs = {} if hookpoint else hooks_for_others(*sites)
    return known(model=model, hookpoint=hookpoint, llama_scope=own, **theirs)


FORMAT = Format("llama_scope", "Llama Scope", detects, read, source="He et al. 2024; huggingface.co/fnlp/Llama-Scope")

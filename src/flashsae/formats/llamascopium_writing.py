"""What is written of an SAE for llamascopium."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.files import atomic
from flashsae.formats.checks import INSTEAD, refuse_normalization, refuse_unset, refuse_widths
from flashsae.formats.content import Content, kept_of, plain_metadata
from flashsae.formats.folds import common_norms, site_norms, subtracting
from flashsae.formats.hook_names import hook_name_of
from flashsae.formats.llamascopium_config import CONFIG, NAME, WEIGHTS
from flashsae.formats.selection import Selection, selection_of

THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
_ACT_FNS = {"topk": "topk", "threshold": "jumprelu", "relu": "relu"}


def write(folder: Path, content: Content, lossy: bool = False) -> list[str]:
    """Write an autoencoder, a transcoder or a crosscoder.

    Args:
        folder: empty.
        content: of ReLU, JumpReLU, TopK, or BatchTopK with its threshold.
        lossy: nothing is ever given up.
    Raises:
        ConfigError: llamascopium has no such SAE.
    """
    selection = selection_of(content)
    _check_held(content, selection)
    if content.apply_b_dec_to_input:
        content = subtracting(_widened(content), False)
    widths = list(content.settings["widths"]) if selection.outer == "crosscoder" else [content.d_in]
    act_fn = "batchtopk" if _is_without_threshold(content) else _ACT_FNS[selection.name]
    weights = _weights(content, len(widths))
    if act_fn == "jumprelu":
        weights[THRESHOLD] = _thresholds(content, selection, len(widths)).log()
    foreign = kept_of(content.metadata, NAME)
    hooks = _hooks(content, selection.outer, foreign)
    for name in hooks.get("hook_points") or (hooks["hook_point_in"], hooks["hook_point_out"]):
        weights[f"{NORM}{name}"] = torch.tensor(
            math.sqrt(widths[0]), dtype=torch.float32, device="cpu"
        )  # a scale of 1, for whoever asks for it
    config = {
        "sae_type": "crosscoder" if selection.outer == "crosscoder" else "sae",
        "d_model": widths[0],
        "expansion_factor": _expansion(widths[0], content.d_sae),
        "use_decoder_bias": True,
        "act_fn": act_fn,
        "norm_activation": "token-wise" if content.normalize_activations == "token_norm" else "inference",
        "sparsity_include_decoder_norm": selection.outer == "crosscoder",
        "top_k": int(content.settings["k"]) if "topk" in act_fn else 50,
        "jumprelu_threshold_window": foreign.get("jumprelu_threshold_window", 2.0),
        **hooks,
        "metadata": plain_metadata({name: value for name, value in content.metadata.items() if name != NAME}),
    }
    atomic.save_tensors(folder / WEIGHTS, weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", "utf-8")
    return []


def _widened(content: Content) -> Content:
    """Return an SAE of half precision in float32, that of parameters there, so that a fold is not rounded to halves."""
    dtype = torch.promote_types(content.dtype, torch.float32)
    return replace(content, tensors={name: tensor.to(dtype) for name, tensor in content.tensors.items()})


def _is_without_threshold(content: Content) -> bool:
    """Tell whether it is a BatchTopK that was never given a threshold, such as one of llamascopium."""
    if selection_of(content).base != "batch_topk":
        return False
    threshold, steps = (content.tensors.get(name) for name in ("threshold", "threshold_steps"))
    is_unset = threshold is None or not bool(threshold)
    return (
        is_unset
        and not (steps is not None and bool(steps))
        and kept_of(content.metadata, NAME).get("act_fn") == "batchtopk"
    )


def _check_held(content: Content, selection: Selection) -> None:
    if selection.outer not in ("", "transcoder", "crosscoder") or selection.name not in _ACT_FNS:
        raise ConfigError(
            f"{NAME} holds SAEs, transcoders and crosscoders of topk, jumprelu and relu, and this is "
            f"{content.architecture}: {INSTEAD}"
        )
    if not _is_without_threshold(content):
        refuse_unset(content, selection, NAME)
    if selection.threshold is not None and not bool((selection.threshold >= 0).all()):
        raise ConfigError(f"{NAME} has logarithms of thresholds, and here is one below 0: {INSTEAD}")
    by_token = ("none",) if selection.outer == "transcoder" else ("none", "token_norm")
    refuse_normalization(content, NAME, by_token)
    widths = content.settings["widths"] if selection.outer == "crosscoder" else [content.d_in, content.d_out]
    refuse_widths(widths, NAME)
    if selection.outer == "crosscoder":
        _check_gates(content, selection, len(widths))


def _check_gates(content: Content, selection: Selection, sites: int) -> None:
    W_dec = content.tensors["W_dec"]
    if not bool((site_norms(W_dec, sites) > 0).all()):
        raise ConfigError(
            f"{NAME} divides latents of a crosscoder by the norms of their decoders, and here is one of zeros: "
            f"{INSTEAD}"
        )
    if selection.name != "relu" and common_norms(W_dec, sites) is None:
        raise ConfigError(
            f"{NAME} selects latents at each hook point by itself, which is the same as here only where decoder rows "
            f"have one norm at all of them, or with relu, and this is {content.architecture}: {INSTEAD}"
        )


def _weights(content: Content, sites: int) -> dict[str, Tensor]:
    """Return the parameters by their names there; those of several sites behind each other."""
    tensors, d_sae = content.tensors, content.d_sae
    if sites == 1:
        return {
            "W_E": tensors["W_enc_T"].T, "b_E": tensors["b_enc"], "W_D": tensors["W_dec"], "b_D": tensors["b_dec"]
        }  # fmt: skip
    b_E = tensors["b_enc"].new_zeros(sites, d_sae)
    b_E[0] = tensors["b_enc"]  # they are added up
    return {
        "W_E": tensors["W_enc_T"].reshape(d_sae, sites, -1).permute(1, 2, 0),
        "b_E": b_E,
        "W_D": tensors["W_dec"].reshape(d_sae, sites, -1).permute(1, 0, 2),
        "b_D": tensors["b_dec"].reshape(sites, -1),
    }


def _thresholds(content: Content, selection: Selection, sites: int) -> Tensor:
    """Return what a pre-activation must exceed there, [d_sae], float64; of a crosscoder times the norm of its row."""
    assert selection.threshold is not None
    threshold = selection.threshold.double()
    if sites == 1:
        return threshold
    if selection.base == "jump_relu":
        norm = common_norms(content.tensors["W_dec"], sites)
        assert norm is not None
        return threshold * norm
    scale = content.tensors.get(
        "site_scale", torch.ones(content.d_out, dtype=torch.float64, device="cpu")
    )  # norms count so much at each site
    return threshold / scale.double().view(sites, -1)[:, 0].sum()


def _expansion(d_model: int, d_sae: int) -> float:
    """Return the factor that d_sae is int(d_model · factor) of, whatever floats make of the quotient."""
    factor = d_sae / d_model
    while int(d_model * factor) < d_sae:
        factor = math.nextafter(factor, math.inf)
    return factor


def _hooks(content: Content, outer: str, foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of hook points: those that it came with, or what transformer-lens calls its hookpoints."""
    model, told = content.metadata.get("model"), content.metadata.get("hookpoint")
    places = told.split(", ") if isinstance(told, str) else []
    if outer == "crosscoder":
        sites, came = content.settings.get("sites"), foreign.get("hook_points")
        count = len(content.settings["widths"])
        places = list(sites) if sites else [f"site {number}" for number in range(count)]
        names = came if isinstance(came, list) and len(came) == count else [_name(place, model) for place in places]
        return {"hook_points": names}
    came = [foreign.get("hook_point_in"), foreign.get("hook_point_out")]
    if None not in came and (came[0] == came[1]) == (outer == ""):
        reads, writes = map(str, came)
    elif outer == "":
        reads = writes = _name(places[0], model) if places else "activations"
    else:
        places = [f"{places[0]}:in", *places] if len(places) == 1 else places or ["in", "out"]
        reads, writes = (_name(place, model) for place in places[:2])
    return {"hook_point_in": reads, "hook_point_out": writes, "use_glu_encoder": False}


def _name(hookpoint: str, model: object) -> str:
    return hook_name_of(hookpoint, model if isinstance(model, str) else None) or hookpoint

"""The SAEs of llamascopium (OpenMOSS, Language-Model-SAEs): config.json and sae_weights.safetensors.

    z = x @ W_E + b_E;   acts = act_fn(z · n) / n;   x_hat = acts @ W_D + b_D,   n_i = ‖W_D[i]‖ or 1

with W_E [d, F], b_E [F], W_D [F, d], b_D [d], and activation_function.log_jumprelu_threshold [F]. Nothing is subtracted
from x. An SAE that reads one hook point and writes another is a transcoder, both of one width. Crosscoders have the
parameters of each hook point behind each other, [H, ...], z summed over them, and a selection at each hook point.

Read: what scales activations is folded, √d / dataset_average_activation_norm of what goes in and comes out, as
`standardize_parameters_of_dataset_norm` does it there, so that latents are in units of the activations; but thresholds
as well, which that leaves as they are. And n is, in latents that are selected by size, or in thresholds. BatchTopK has
no threshold there: it selects in `train()` as it does there.

Written: as norm_activation inference, or token-wise, and with n = 1. A b_dec that is subtracted goes into b_E.
Thresholds are written as float64 logarithms, from which they are read again bitwise; llamascopium rounds them to the
dtype of its parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, FlashSAEWarning
from flashsae.files.documents import load_pickle, load_tensors
from flashsae.formats.checks import check_tensors, check_threshold, glimpse, widest
from flashsae.formats.content import Content, Format
from flashsae.formats.folds import common_norms, inverse_of, norms, scaled
from flashsae.formats.llamascopium_config import (
    CONFIG,
    FETCH,
    NAME,
    Description,
    described,
    metadata_of,
    named_hooks,
    weights_file,
)
from flashsae.formats.llamascopium_writing import NORM, THRESHOLD, write
from flashsae.formats.selection import joined, settings_of_reading

_OLD_NAMES = {
    "encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D",
    "log_jumprelu_threshold": THRESHOLD,
}  # fmt: skip
"""Of early 2025, with matrices the other way round, as in fnlp/Llama-Scope-R1-Distill."""
_BASES = {"relu": "relu", "jumprelu": "jump_relu", "topk": "topk", "batchtopk": "batch_topk"}


def detects(path: Path) -> bool:
    """Tell whether a folder holds what llamascopium saved."""
    return {"sae_type", "d_model", "expansion_factor"} <= glimpse(path / CONFIG).keys()


def read(path: Path) -> Content:
    """Return the SAE, transcoder or crosscoder of a folder.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or it is nothing that an SAE here can do.
    """
    config = described(path / CONFIG)
    file = weights_file(path)
    tensors = load_pickle(file, "sae") if file.suffix == ".pt" else load_tensors(file)
    found = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if len(found) < len(tensors):
        raise CheckpointError(f"{file} is damaged: it holds numbers among its tensors. {FETCH}")
    if "encoder.weight" in found:
        found = {_OLD_NAMES.get(name, name): _turned(name, value) for name, value in found.items()}
    told = {name.removeprefix(NORM): found.pop(name) for name in list(found) if name.startswith(NORM)}
    dtype = _check(file, config, found)
    factors = _factors(file, config, told)
    threshold = found.pop(THRESHOLD).double().exp() if THRESHOLD in found else None
    if dtype.itemsize == 2 and not _is_exact(config, found["b_E"], threshold, dtype):
        dtype = torch.float32  # that of parameters there, whatever a file holds
    weights = _side_by_side(config, {name: value.to(dtype) for name, value in found.items()})
    if threshold is not None:
        weights["threshold"] = threshold
    folded = (_folded_sites if config.is_crosscoder else _folded)(file, config, weights, factors)
    if config.act_fn == "batchtopk":
        folded["threshold"] = torch.zeros((), dtype=torch.float32, device="cpu")
        warnings.warn(
            f"{path} is a BatchTopK without a threshold: llamascopium selects the largest of each batch, as this does "
            "after .train(); in .eval() everything positive is active.",
            FlashSAEWarning,
            stacklevel=2,
        )
    return Content(
        _architecture(config),
        _settings(config),
        {name: value.to(dtype).contiguous() for name, value in folded.items()},
        apply_b_dec_to_input=False,
        normalize_activations="token_norm" if config.norm_activation == "token-wise" else "none",
        metadata=metadata_of(config),
    )


def _is_exact(config: Description, b_E: Tensor, threshold: Tensor | None, dtype: torch.dtype) -> bool:
    """Tell whether nothing is folded that half precision would round: scales, norms, sums, thresholds."""
    is_weighted = config.sparsity_include_decoder_norm and config.act_fn != "relu" and not config.is_crosscoder
    if config.norm_activation == "dataset-wise" or is_weighted:
        return False
    summed = b_E.double().sum(0)
    if config.is_crosscoder and not torch.equal(summed.to(dtype).double(), summed):
        return False
    return threshold is None or torch.allclose(threshold.to(dtype).double(), threshold, rtol=1e-12, atol=0)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in ("encoder.weight", "decoder.weight") and tensor.dim() == 2 else tensor


def _architecture(config: Description) -> str:
    outer = "crosscoder" if config.is_crosscoder else "transcoder" if len(config.hooks) > 1 else ""
    return joined(outer, _BASES[config.act_fn])


def _settings(config: Description) -> dict[str, Any]:
    base = _BASES[config.act_fn]
    of_base = {"k": config.top_k} if "topk" in base else settings_of_reading(base, config.d_sae)
    names = named_hooks(config)
    hooks = config.hooks if names is None else names.split(", ")
    of_sites = {"sites": hooks, "widths": [config.d_model] * len(hooks)} if config.is_crosscoder else {}
    return {**of_base, **of_sites}


def _check(file: Path, config: Description, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of weights that have the shapes they must have."""
    d, d_sae = config.d_model, config.d_sae
    sites = (len(config.hooks),) if config.sae_type == "crosscoder" else ()
    shapes: dict[str, tuple[int, ...]] = {"W_E": (d, d_sae), "b_E": (d_sae,), "W_D": (d_sae, d)}
    shapes |= {"b_D": (d,)} if config.use_decoder_bias else {}
    shapes = {name: (*sites, *shape) for name, shape in shapes.items()}
    thresholds = {THRESHOLD: (d_sae,)} if config.act_fn == "jumprelu" else {}
    check_tensors(file, tensors, shapes | thresholds)
    if thresholds:
        check_threshold(file, tensors[THRESHOLD])
    return widest({name: tensors[name] for name in shapes})


def _side_by_side(config: Description, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by our names, those of several hook points beside each other."""
    W_E, b_E, W_D = tensors["W_E"], tensors["b_E"], tensors["W_D"]
    b_D = tensors.get("b_D", W_D.new_zeros(config.d_model))
    if config.sae_type == "sae":
        return {"W_enc_T": W_E.T, "b_enc": b_E, "W_dec": W_D, "b_dec": b_D}
    return {
        "W_enc_T": W_E.permute(2, 0, 1).reshape(config.d_sae, -1),
        "b_enc": b_E.double().sum(0).to(b_E.dtype),
        "W_dec": W_D.permute(1, 0, 2).reshape(config.d_sae, -1),
        "b_dec": b_D.reshape(-1),
    }


def _factors(file: Path, config: Description, told: Mapping[str, Tensor]) -> list[float] | None:
    """Return what llamascopium multiplies the activations of each hook point with; None where they stay as they are."""
    if config.norm_activation != "dataset-wise":
        return None  # what the file holds of norms was never set
    factors = []
    for hook in config.hooks:
        value = told.get(hook)
        norm = math.nan if value is None or value.numel() != 1 else float(value)
        if not (0 < norm < math.inf):
            raise CheckpointError(
                f"{file}: norm_activation is dataset-wise, and there is no positive {NORM}{hook[:80]}: train it to its "
                "end, or set_dataset_average_activation_norm there."
            )
        factors.append(math.sqrt(config.d_model) / norm)
    return factors


def _folded(
    file: Path, config: Description, tensors: Mapping[str, Tensor], factors: list[float] | None
) -> dict[str, Tensor]:
    """Return parameters for activations as they come, and latents that are selected by their own values."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    enc: Tensor | None = None  # what rows and biases are multiplied by
    dec: Tensor | None = None
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    threshold = tensors.get("threshold")
    if config.sparsity_include_decoder_norm and config.act_fn != "relu":  # a ReLU goes by the sign alone
        norm = norms(tensors["W_dec"])
        if threshold is None:
            enc = b_enc = norm
            dec = inverse_of(norm)
        else:
            threshold = torch.where(norm > 0, threshold / norm, math.inf)
    if factors is not None:
        goes_in, comes_out = factors[0], factors[-1]
        b_enc = (one if enc is None else enc) / goes_in
        dec = (one if dec is None else dec) * (goes_in / comes_out)
        b_dec = one / comes_out
        threshold = None if threshold is None else threshold / goes_in
    folded = {
        "W_enc_T": scaled(tensors["W_enc_T"], enc),
        "b_enc": scaled(tensors["b_enc"], b_enc),
        "W_dec": scaled(tensors["W_dec"], dec),
        "b_dec": scaled(tensors["b_dec"], b_dec),
    }
    return folded if threshold is None else {**folded, "threshold": threshold}


def _folded_sites(
    file: Path, config: Description, tensors: Mapping[str, Tensor], factors: list[float] | None
) -> dict[str, Tensor]:
    """Return the same of a crosscoder, where one selection does for all hook points.

    There each has a selection of its own, of z · ‖W_D[s, i]‖. All are the same where these norms are, and their sum,
    by which crosscoders here select, gives it, too; or where latents go through a ReLU, which norms change nothing of.
    """
    folded, count = dict(tensors), len(config.hooks)
    norm = None if config.act_fn == "relu" else common_norms(tensors["W_dec"], count)
    if config.act_fn != "relu" and norm is None:
        raise CheckpointError(
            f"{file}: a crosscoder of {config.act_fn} selects latents at each hook point by itself there, and at all "
            "together here, which is the same only where rows of W_D have one norm at all of them, or with relu: use "
            "llamascopium for it."
        )
    if "threshold" in folded and norm is not None:
        folded["threshold"] = torch.where(norm > 0, folded["threshold"] / norm, math.inf)
    if factors is None:
        return folded
    columns = torch.tensor(factors, dtype=torch.float64, device="cpu").repeat_interleave(config.d_model)
    folded["W_enc_T"] = scaled(folded["W_enc_T"], columns=columns)
    folded["W_dec"] = scaled(folded["W_dec"], columns=columns.reciprocal())
    folded["b_dec"] = scaled(folded["b_dec"], columns.reciprocal())
    return {**folded, "site_scale": columns}


FORMAT = Format(
    NAME,
    "llamascopium",
    detects,
    read,
    write,
    source="llamascopium 2.0.0b34, models/sparse_dictionary.py, sae.py and crosscoder.py",
)

"""Sparse decode: the reconstruction from k latents a token, and the loss and gradients that follow from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops.decode import operators  # noqa: F401 - makes torch.ops.flashsae.decode_sparse
from flashsae.ops.index import LatentIndex, check_index
from flashsae.ops.validate import (
    Precision,
    check_constant,
    check_device,
    check_float,
    check_indices,
    check_precision,
    check_shape,
    has_values,
)


def decode_sparse(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    index: LatentIndex | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Reconstruct tokens from their k active latents.

        x_hat[b] = Σ over j of top_acts[b, j] · W_dec[top_indices[b, j]] + b_dec

    Args:
        top_acts: [B, k], float, same scale as x. Need not be sorted.
        top_indices: [B, k], int32 | int64, each in [0, d_sae). Repeats within a row add up.
        W_dec: [d_sae, d_in], float.
        b_dec: [d_in], dtype of W_dec, or float32, or None for no bias.
        index: of these very top_indices, from `build_index` or `encode_topk`, if there is one already; the backward
            pass builds it otherwise.
        precision: "bf16" rounds W_dec to bfloat16 first, halving what is gathered; gradients keep the dtype of W_dec.
            None, "float32", "tf32": W_dec as it is.
    Returns:
        x_hat: [B, d_in], dtype of W_dec, or bfloat16.
    Raises:
        ShapeError, DtypeError: names the argument, the expected and the actual shape or dtype.
        ConfigError: the index is of other indices, or of these before they were changed.
    Numerics: deterministic; accumulated in float32 (float64 where top_acts or W_dec is), rounded once.
    Gradients: top_acts, W_dec and b_dec; those of W_dec are segment sums over the active latents only, or a factor
        of them where `collect_factors` asked for it. Once differentiable.
    Cost: B·k·d_in multiply-adds forward, twice that backward, whatever d_sae. Where k / d_sae is above the measured
        crossover, dense matrix products instead (logged once).
    Source: ours, docs/methodology.md#sparse-decode.
    """
    lists = _check(top_acts, top_indices, W_dec, b_dec, index, precision)
    rounded = precision == "bf16"
    dtype = torch.bfloat16 if rounded else W_dec.dtype
    x_hat: Tensor = torch.ops.flashsae.decode_sparse(top_acts, top_indices, W_dec, b_dec, lists, rounded, dtype)
    return x_hat


class DecodeLoss(NamedTuple):
    """What `decode_loss` returns.

    Args:
        loss: scalar, float32 (float64 where top_acts, W_dec or target is).
        x_hat: [B, d_in], dtype of W_dec (bfloat16 in that precision). Carries no gradient.
        residual: [B, d_in], target - x_hat, in the same dtype. Carries no gradient.
    """

    loss: Tensor
    x_hat: Tensor
    residual: Tensor


def decode_loss(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    weights: Tensor | None = None,
    index: LatentIndex | None = None,
    precision: Precision | None = None,
) -> DecodeLoss:
    """Reconstruct, compare and differentiate by the activations, in one pass over the active decoder rows.

        loss = Σ over b of weights[b] · ‖target[b] − x_hat[b]‖²,   x_hat as in `decode_sparse`

    Args:
        top_acts, top_indices, W_dec, b_dec, index, precision: as in `decode_sparse`.
        target: [B, d_in], float: x for an autoencoder, the output of a module for a transcoder.
        weights: [B], float, of the tokens; None is 1 each. Divide here by whatever the loss is to be relative to.
    Returns:
        loss, x_hat and residual.
    Raises:
        ShapeError, DtypeError, ConfigError: as in `decode_sparse`.
        GradientError: weights require a gradient.
    Numerics: deterministic; errors and dot products from the unrounded residual in float32 (float64 where top_acts,
        W_dec or target is; above the dense crossover: from a product rounded to the dtype of W_dec). The gradients of
        W_dec and b_dec use the residual as returned, so rounded to the dtype of W_dec.
    Gradients: of loss by top_acts, W_dec (as in `decode_sparse`), b_dec and target. Those of the activations are
        computed on the way. That of a target of more bits than W_dec decodes once more. Weights receive none. Once
        differentiable.
    Cost: reads each of the B·k decoder rows once (k <= 256; twice above): B·k·d_in elements. Backward: that of W_dec.
    Source: ours, docs/methodology.md#sparse-decode.
    """
    lists = _check(top_acts, top_indices, W_dec, b_dec, index, precision)
    check_shape("target", target, (top_indices.shape[0], W_dec.shape[1]))
    check_float("target", target)
    check_device("target", target, W_dec, "W_dec")
    if weights is not None:
        check_shape("weights", weights, (top_indices.shape[0],))
        check_float("weights", weights)
        check_device("weights", weights, W_dec, "W_dec")
        check_constant("weights", weights)
    errors, x_hat, residual, _ = torch.ops.flashsae.decode_loss(
        top_acts, top_indices, W_dec, b_dec, target, weights, lists, precision == "bf16"
    )
    return DecodeLoss(errors.sum(), x_hat.detach(), residual.detach())


def _check(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    index: LatentIndex | None,
    precision: Precision | None,
) -> list[Tensor]:
    """Raise unless the arguments fit each other; return the lists of the index that may be used."""
    check_precision(precision)
    check_shape("W_dec", W_dec, ("d_sae", "d_in"))
    check_shape("top_indices", top_indices, ("B", "k"))
    if 0 in (top_indices.shape[1], W_dec.shape[1]):
        raise ShapeError(f"k and d_in: expected at least 1, got {top_indices.shape[1]} and {W_dec.shape[1]}.")
    check_shape("top_acts", top_acts, tuple(top_indices.shape))
    check_float("W_dec", W_dec)
    check_float("top_acts", top_acts)
    check_device("top_acts", top_acts, W_dec, "W_dec")
    check_device("top_indices", top_indices, W_dec, "W_dec")
    check_indices("top_indices", top_indices, W_dec.shape[0])
    if b_dec is not None:
        check_shape("b_dec", b_dec, (W_dec.shape[1],))
        check_float("b_dec", b_dec, W_dec, "W_dec", or_dtype=torch.float32)
    return [] if index is None else _lists(index, top_indices, W_dec)


def _lists(index: LatentIndex, top_indices: Tensor, W_dec: Tensor) -> list[Tensor]:
    check_index(index)
    if (index.d_sae, index.entries.shape[0]) != (W_dec.shape[0], top_indices.numel()):
        raise ShapeError(
            f"index: expected one of {top_indices.numel()} entries and {W_dec.shape[0]} latents, got one of "
            f"{index.entries.shape[0]} and {index.d_sae}."
        )
    if not index.is_of(top_indices):
        if not has_values(top_indices):
            return []  # nobody can tell; building it again is right in any case
        raise ConfigError(
            "index: expected that of top_indices, got that of other indices, or of these before they were changed: "
            "leave it out, or build it again with build_index(top_indices, d_sae)."
        )
    return [index.entries, index.latents, index.offsets]

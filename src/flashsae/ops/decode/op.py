"""Sparse decode: the reconstruction from the latents of a code, and the loss and gradients that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops.code import SparseCode, check_code
from flashsae.ops.decode import operators  # noqa: F401 - makes torch.ops.flashsae.decode
from flashsae.ops.gradients import share
from flashsae.ops.validate import (
    Precision,
    as_int,
    check_constant,
    check_device,
    check_float,
    check_precision,
    check_shape,
)


def decode(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor | None = None, *, precision: Precision | None = None
) -> Tensor:
    """Reconstruct tokens from their active latents.

        x_hat[b] = Σ over entries e of token b of acts[e] · W_dec[latents[e]] + b_dec

    Args:
        code: of B tokens, from `encode_topk` and its kin, or `SparseCode.topk`; its `batch_shape` is ignored.
        W_dec: [d_sae, d_in], float.
        b_dec: [d_in], dtype of W_dec, or float32, or None for no bias.
        precision: "bf16" rounds W_dec to bfloat16 first, halving what is gathered; gradients keep the dtype of W_dec.
            None, "float32", "tf32": W_dec as it is.
    Returns:
        x_hat: [B, d_in], dtype of W_dec, or bfloat16.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
    Numerics: deterministic; accumulated in float32 (float64 where acts or W_dec is), rounded once.
    Gradients: acts, W_dec and b_dec; those of W_dec are segment sums over the active latents only, or a factor
        of them where `collect_factors` asked for it. Once differentiable.
    Cost: nnz·d_in multiply-adds forward, twice that backward, whatever d_sae. Where nnz / (B·d_sae) is above the
        measured crossover, dense matrix products instead (logged once).
    Source: ours, docs/methodology.md#sparse-decode.
    """
    _check(code, W_dec, b_dec, precision)
    rounded = precision == "bf16"
    dtype = torch.bfloat16 if rounded else W_dec.dtype
    x_hat: Tensor = torch.ops.flashsae.decode(code.acts, code.pattern.tensors, W_dec, b_dec, rounded, dtype)
    share(code.pattern, x_hat)
    return x_hat


class DecodeLoss(NamedTuple):
    """What `decode_loss` returns.

    Args:
        loss: scalar, or [len(prefixes)] where prefixes are given; float32 (float64 where acts, W_dec or target is).
        x_hat: [B, d_in], dtype of W_dec (bfloat16 in that precision). Carries no gradient.
        residual: [B, d_in], target - x_hat, in the same dtype. Carries no gradient.
    """

    loss: Tensor
    x_hat: Tensor
    residual: Tensor


def decode_loss(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    token_weights: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    precision: Precision | None = None,
) -> DecodeLoss:
    """Reconstruct, compare and differentiate by the activations, in one pass over the active decoder rows.

        loss = Σ over b of token_weights[b] · ‖target[b] − x_hat[b]‖²,   x_hat as in `decode`

    Args:
        code, W_dec, b_dec, precision: as in `decode`.
        target: [B, d_in], float: x for an autoencoder, the output of a module for a transcoder.
        token_weights: [B], float; None is 1 each. Divide here by whatever the loss is to be relative to.
        prefixes: ascending numbers of latents, of which the last is d_sae: a loss for each, of the reconstruction from
            latents below it alone, as a Matryoshka SAE trains with. None: one, of all.
    Returns:
        loss, x_hat and residual; these two of all latents.
    Raises:
        ShapeError, DtypeError, ConfigError: as in `decode`.
        GradientError: token_weights require a gradient.
    Numerics: deterministic; errors and dot products from the unrounded residual in float32 (float64 where acts,
        W_dec or target is; above the dense crossover: from a product rounded to the dtype of W_dec). The gradients of
        W_dec and b_dec use the residual as returned, so rounded to the dtype of W_dec.
    Gradients: of loss by acts, W_dec (as in `decode`), b_dec and target. Those of the activations are computed on the
        way. That of a target of more bits than W_dec decodes once more. Token weights receive none. Once
        differentiable.
    Cost: reads each of the nnz decoder rows once (a fixed k above 256: twice; where tokens differ, those of a token
        that has more than most: the second time from the cache): nnz·d_in elements; as often as there are prefixes.
        Backward: that of W_dec.
    Source: ours, docs/methodology.md#sparse-decode; prefixes: Bussmann et al. 2025.
    """
    _check(code, W_dec, b_dec, precision)
    check_shape("target", target, (code.pattern.B, W_dec.shape[1]))
    check_float("target", target)
    check_device("target", target, W_dec, "W_dec")
    if token_weights is not None:
        check_shape("token_weights", token_weights, (code.pattern.B,))
        check_float("token_weights", token_weights)
        check_device("token_weights", token_weights, W_dec, "W_dec")
        check_constant("token_weights", token_weights)
    parts = [code]
    if prefixes is not None:
        limits = _as_prefixes(prefixes, code.d_sae)
        latents = code.pattern.latents
        parts = [code.replace(torch.where(latents < limit, code.acts, 0.0)) for limit in limits[:-1]] + parts
    losses = []
    for part in parts:
        errors, x_hat, residual, _ = torch.ops.flashsae.decode_loss(
            part.acts, part.pattern.tensors, W_dec, b_dec, target, token_weights, precision == "bf16"
        )
        share(part.pattern, errors)
        losses.append(errors.sum())
    loss = losses[0] if prefixes is None else torch.stack(losses)
    return DecodeLoss(loss, x_hat.detach(), residual.detach())


def _as_prefixes(prefixes: Sequence[int], d_sae: int) -> list[int]:
    limits = [as_int("prefixes", prefix) for prefix in prefixes]
    rises = all(low < high for low, high in zip([0, *limits], limits))
    if not limits or not rises or limits[-1] != d_sae:
        raise ConfigError(f"prefixes: expected ascending numbers of latents, the last {d_sae} as d_sae, got {limits}.")
    return limits


def _check(code: SparseCode, W_dec: Tensor, b_dec: Tensor | None, precision: Precision | None) -> None:
    """Raise unless the arguments fit each other."""
    check_precision(precision)
    check_code(code)
    check_shape("code.acts", code.acts, tuple(code.pattern.latents.shape))
    check_shape("W_dec", W_dec, (code.d_sae, "d_in"))
    if 0 in (code.pattern.k, W_dec.shape[1]):
        raise ShapeError(f"k and d_in: expected at least 1, got {code.pattern.k} and {W_dec.shape[1]}.")
    check_float("W_dec", W_dec)
    check_device("code", code.acts, W_dec, "W_dec")
    if b_dec is not None:
        check_shape("b_dec", b_dec, (W_dec.shape[1],))
        check_float("b_dec", b_dec, W_dec, "W_dec", or_dtype=torch.float32)

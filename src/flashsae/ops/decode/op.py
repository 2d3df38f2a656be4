"""Sparse decode: the reconstruction from the latents of a code, and the loss and gradients that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops.code import SparseCode, check_code
from flashsae.ops.decode import level_operators, operators  # noqa: F401 - make torch.ops.flashsae.decode and its kin
from flashsae.ops.decode.levels import levels_of
from flashsae.ops.gradients import share
from flashsae.ops.validate import (
    Precision,
    check_constant,
    check_device,
    check_float,
    check_precision,
    check_shape,
)
from flashsae.precision import is_rounded


def decode(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor | None = None, *, precision: Precision | None = None
) -> Tensor:
    """Reconstruct tokens from their active latents.

        x_hat[b] = Σ over entries e of token b of acts[e] · W_dec[latents[e]] + b_dec

    Args:
        code: of B tokens, from `encode_topk` and its kin, or `SparseCode.topk`; its `batch_shape` is ignored.
        W_dec: [d_sae, d_in], float.
        b_dec: [d_in], dtype of W_dec, or float32, or None for no bias.
        precision: "bf16", "bf16-int8": W_dec is rounded to bfloat16 first, halving what is gathered; gradients keep the
            dtype of W_dec. None and the others: W_dec as it is.
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
    rounded = is_rounded(precision)
    dtype = torch.bfloat16 if rounded else W_dec.dtype
    x_hat: Tensor = torch.ops.flashsae.decode(code.acts, code.pattern.tensors, W_dec, b_dec, rounded, dtype)
    share(code.pattern, x_hat)
    return x_hat


class DecodeLoss(NamedTuple):
    """What `decode_loss` returns.

    Args:
        loss: scalar, float32 (float64 where acts, W_dec or target is); the weighted sum over levels, where there are
            any.
        x_hat: [B, d_in], dtype of W_dec (bfloat16 in that precision), of all latents. Carries no gradient.
        residual: [B, d_in], target - x_hat, in the same dtype. Carries no gradient.
    """

    loss: Tensor
    x_hat: Tensor
    residual: Tensor

    @property
    def level_losses(self) -> Tensor:
        """The loss of each level without its weight, the last that of all latents: [L]. Carries no gradient."""
        return self.loss.detach()[None]


class _NestedLoss(DecodeLoss):
    """A `DecodeLoss` of several levels, which unpacks into as many parts as one of one level."""

    losses: Tensor

    @property
    def level_losses(self) -> Tensor:
        return self.losses


def decode_loss(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    token_weights: Tensor | None = None,
    prefixes: Sequence[int] | Tensor | None = None,
    budgets: Sequence[int] | None = None,
    level_weights: Sequence[float] | Tensor | None = None,
    precision: Precision | None = None,
) -> DecodeLoss:
    """Reconstruct, compare and differentiate by the activations, in one pass over the active decoder rows.

        loss = Σ over b of token_weights[b] · ‖target[b] − x_hat[b]‖²,   x_hat as in `decode`

    With prefixes or budgets there are L nested reconstructions, of which each holds the entries of the one before it:

        loss = Σ over l of level_weights[l] · Σ over b of token_weights[b] · ‖target[b] − x_hat_l[b]‖²

    Args:
        code, W_dec, b_dec, precision: as in `decode`.
        target: [B, d_in], float: x for an autoencoder, the output of a module for a transcoder.
        token_weights: [B], float; None is 1 each. Divide here by whatever the loss is to be relative to.
        prefixes: ascending numbers of latents, of which the last is d_sae: level l reconstructs from the latents below
            prefixes[l] alone, as a Matryoshka SAE trains with. Ints, or [L], int32 | int64, on the device of the code,
            whose numbers are looked at on the CPU only.
        budgets: ascending numbers of entries, of which the last is k: level l reconstructs from the first budgets[l]
            entries of each token, in the order in which the code of k latents has them.
        level_weights: L numbers, or [L], float; None is 1 / L each, so that the loss is the mean over levels.
    Returns:
        loss, x_hat, residual and, as `level_losses`, the loss of each level; x_hat and residual of all latents.
    Raises:
        ShapeError, DtypeError, ConfigError: as in `decode`.
        GradientError: token_weights or level_weights require a gradient.
    Numerics: deterministic; errors and dot products from unrounded residuals in float32 (float64 where acts, W_dec or
        target is; above the dense crossover: from a product rounded to the dtype of W_dec). The gradients of W_dec and
        b_dec use the residual as returned, so rounded to the dtype of W_dec; at levels that of W_dec uses the sum of
        their weighted residuals, rounded once, and those of b_dec and target are not rounded before the end.
    Gradients: of loss by acts, W_dec (as in `decode`), b_dec and target. Those of the activations are computed on the
        way. That of a target of more bits than W_dec decodes once more. Weights receive none. Once differentiable.
    Cost: reads each of the nnz decoder rows once (a fixed k above 256, and levels: twice, the second time mostly from
        the cache; where tokens differ, those of a token that has more than most so too): nnz·d_in elements, however
        many levels there are. Backward: that of W_dec. Levels write B·L rows of d_in numbers for it.
    Source: ours, docs/methodology.md#sparse-decode; prefixes: Bussmann et al. 2025; budgets: Balagansky et al. 2025.
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
    levels = levels_of(code, prefixes, budgets, level_weights)
    rounded = is_rounded(precision)
    if levels is None:
        errors, x_hat, residual, _ = torch.ops.flashsae.decode_loss(
            code.acts, code.pattern.tensors, W_dec, b_dec, target, token_weights, rounded
        )
        share(code.pattern, errors)
        return DecodeLoss(errors.sum(), x_hat.detach(), residual.detach())
    errors, level_errors, x_hat, residual, *_ = torch.ops.flashsae.decode_levels(
        levels.code.acts, levels.lists, W_dec, b_dec, target, token_weights, levels.weights, rounded
    )
    share(levels.code.pattern, errors)
    nested = _NestedLoss(errors.sum(), x_hat.detach(), residual.detach())
    nested.losses = level_errors.detach().sum(0)
    return nested


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

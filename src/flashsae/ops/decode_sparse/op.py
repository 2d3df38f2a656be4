"""Sparse decode: the reconstruction from k latents a token, and the loss and gradients that follow from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsae.backend import use_dense, use_kernels
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.decode_sparse import reference
from flashsae.ops.dense import op as dense
from flashsae.ops.gradients import collects, is_dense, weight_gradient
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows.op import column_sums
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import (
    Precision,
    check_constant,
    check_device,
    check_float,
    check_indices,
    check_precision,
    check_shape,
    compute_dtype,
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
    if not isinstance(index, LatentIndex):
        raise DtypeError(f"index: expected a LatentIndex, from build_index, got {type(index).__name__}.")
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


def _decode_sparse_fake(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    index: list[Tensor],
    rounded: bool,
    dtype: torch.dtype,
) -> Tensor:
    return W_dec.new_empty(top_indices.shape[0], W_dec.shape[1], dtype=dtype)


@operator(_decode_sparse_fake)
def _decode_sparse(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    index: list[Tensor],
    rounded: bool,
    dtype: torch.dtype,
) -> Tensor:
    return _decode(top_acts, top_indices, _maybe_rounded(W_dec, rounded), b_dec, dtype)


def _maybe_rounded(W_dec: Tensor, rounded: bool) -> Tensor:
    return W_dec.to(torch.bfloat16) if rounded else W_dec


def _decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not use_kernels(W_dec, top_acts):
        return reference.decode_sparse(top_acts, top_indices, W_dec, b_dec).to(dtype)
    # a dense product is rounded to the dtype of W_dec, so it serves nobody who asks for more
    if dtype == W_dec.dtype and use_dense(top_indices.shape[1], W_dec.shape[0], W_dec):
        return dense.decode_sparse(top_acts, top_indices, W_dec, b_dec).to(dtype)
    from flashsae.ops.decode_sparse.launch import launch_decode

    return launch_decode(top_acts, top_indices, W_dec, b_dec, dtype)


def _decode_grad_acts_fake(grad_x_hat: Tensor, top_indices: Tensor, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_x_hat.new_empty(top_indices.shape, dtype=dtype)


@operator(_decode_grad_acts_fake)
def _decode_grad_acts(grad_x_hat: Tensor, top_indices: Tensor, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the activations in `dtype`, a compute dtype."""
    if dtype == torch.float64 or not use_kernels(W_dec):
        return reference.decode_sparse_grad_acts(grad_x_hat, top_indices, W_dec, dtype)
    if use_dense(top_indices.shape[1], W_dec.shape[0], W_dec):
        return dense.decode_sparse_grad_acts(grad_x_hat, top_indices, W_dec)
    from flashsae.ops.decode_sparse.launch import launch_dots

    return launch_dots(grad_x_hat, top_indices, W_dec)


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    top_acts, top_indices, W_dec, b_dec, index, rounded, _ = inputs
    ctx.rounded, ctx.as_factor = rounded, collects(W_dec)
    ctx.save_for_backward(top_acts, top_indices, W_dec, *index)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype


def _decode_backward(ctx: Any, grad_x_hat: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    top_acts, top_indices, W_dec, *lists = ctx.saved_tensors
    needs_acts, _, needs_W_dec, needs_b_dec, *_ = ctx.needs_input_grad
    grad_acts = grad_W_dec = grad_b_dec = None
    if needs_acts:
        rows = _maybe_rounded(W_dec, ctx.rounded)
        dtype = compute_dtype(top_acts.dtype, rows.dtype)
        grad_acts = torch.ops.flashsae.decode_grad_acts(grad_x_hat, top_indices, rows, dtype).to(top_acts.dtype)
    if needs_W_dec:
        index = _index(lists, top_indices, W_dec, grad_x_hat)
        grad_W_dec, _ = weight_gradient(ctx.as_factor, top_indices, index, top_acts, grad_x_hat, W_dec)
    if needs_b_dec:
        ones = grad_x_hat.new_ones(grad_x_hat.shape[0])
        grad_b_dec = column_sums(ones, grad_x_hat, ctx.bias_dtype)
    return grad_acts, None, grad_W_dec, grad_b_dec, [None] * len(lists), None, None


differentiate("decode_sparse", _decode_backward, _save_decode)


def _decode_loss_fake(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    weights: Tensor | None,
    index: list[Tensor],
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_hat = W_dec.new_empty(target.shape, dtype=torch.bfloat16 if rounded else W_dec.dtype)
    dtype = compute_dtype(x_hat.dtype, top_acts.dtype, target.dtype)
    errors = x_hat.new_empty(target.shape[0], dtype=dtype)
    return errors, x_hat, torch.empty_like(x_hat), x_hat.new_empty(top_acts.shape, dtype=dtype)


@operator(_decode_loss_fake)
def _decode_loss(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    weights: Tensor | None,
    index: list[Tensor],
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_dec = _maybe_rounded(W_dec, rounded)
    k, d_sae = top_indices.shape[1], W_dec.shape[0]
    if use_kernels(W_dec, top_acts, target):
        from flashsae.ops.decode_sparse.launch import LARGEST_FUSED_K, launch_decode_loss, launch_residual

        if use_dense(k, d_sae, W_dec):
            x_hat = dense.product(top_acts, top_indices, W_dec)
            errors, residual = launch_residual(x_hat, b_dec, target, weights)
            grad_acts = dense.decode_sparse_grad_acts(residual, top_indices, W_dec)
            scale = -2.0 if weights is None else -2.0 * weights.float()[:, None]
            return errors, x_hat, residual, grad_acts * scale
        if k <= LARGEST_FUSED_K:
            return launch_decode_loss(top_acts, top_indices, W_dec, b_dec, target, weights)
    dtype = compute_dtype(W_dec.dtype, top_acts.dtype, target.dtype)
    x_hat = _decode(top_acts.to(dtype), top_indices, W_dec, b_dec, dtype)
    residual = target.to(dtype) - x_hat
    weight = torch.ones_like(residual[:, 0]) if weights is None else weights.to(dtype)
    errors = weight * residual.square().sum(1)
    grad_acts = _decode_grad_acts(residual, top_indices, W_dec, dtype) * (-2 * weight)[:, None]
    return errors, x_hat.to(W_dec.dtype), residual.to(W_dec.dtype), grad_acts


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    top_acts, top_indices, W_dec, b_dec, target, weights, index, rounded = inputs
    residual, grad_acts = output[2], output[3]
    ctx.set_materialize_grads(False)  # only the errors have a gradient: no zeros for the rest
    ctx.as_factor, ctx.rounded = collects(W_dec), rounded
    # the gradient of a target of more bits than the residual as returned needs one that has as many
    is_wide = target.requires_grad and torch.finfo(target.dtype).eps < torch.finfo(residual.dtype).eps
    wide = (target, b_dec) if is_wide else (None, None)
    ctx.save_for_backward(top_acts, top_indices, W_dec, residual, grad_acts, weights, *wide, *index)
    ctx.dtypes = None if b_dec is None else b_dec.dtype, target.dtype


def _loss_backward(ctx: Any, grad_errors: Tensor, *_others: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    top_acts, top_indices, W_dec, residual, grad_acts, weights, wide_target, b_dec, *lists = ctx.saved_tensors
    needs_acts, _, needs_W_dec, needs_b_dec, needs_target, *_ = ctx.needs_input_grad
    bias_dtype, target_dtype = ctx.dtypes
    slope = -2 * grad_errors  # of the error of each token by its residual, without the residual
    if weights is not None:
        slope = slope * weights.to(slope.dtype)
    grad_W_dec = grad_b_dec = grad_target = None
    if needs_W_dec:
        index = _index(lists, top_indices, W_dec, residual)
        coeffs = top_acts.to(slope.dtype) * slope[:, None]
        grad_W_dec, _ = weight_gradient(ctx.as_factor, top_indices, index, coeffs, residual, W_dec)
    if needs_b_dec:
        grad_b_dec = column_sums(slope, residual, bias_dtype)
    if needs_target:
        if wide_target is not None:
            code = top_acts.to(slope.dtype), top_indices, W_dec, b_dec
            residual = wide_target - torch.ops.flashsae.decode_sparse(*code, [], ctx.rounded, slope.dtype)
        grad_target = (residual.to(slope.dtype) * -slope[:, None]).to(target_dtype)
    grad_top_acts = (grad_acts * grad_errors[:, None]).to(top_acts.dtype) if needs_acts else None
    return grad_top_acts, None, grad_W_dec, grad_b_dec, grad_target, None, [None] * len(lists), None


differentiate("decode_loss", _loss_backward, _save_loss)


def _index(lists: list[Tensor], top_indices: Tensor, W_dec: Tensor, rows: Tensor) -> LatentIndex | None:
    """Return the index that the gradient of W_dec needs, if it needs one."""
    k, d_sae = top_indices.shape[1], W_dec.shape[0]
    if is_dense(rows, k, d_sae):
        return None
    return LatentIndex(lists[0], lists[1], lists[2], k) if lists else build_index(top_indices, d_sae)

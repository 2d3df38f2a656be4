"""The operators of sparse decode: how they run, what their results look like, and their backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.backend import use_dense, use_kernels
from flashsae.ops.decode import reference
from flashsae.ops.dense import op as dense
from flashsae.ops.gradients import collects, is_dense, weight_gradient
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows.op import column_sums
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import compute_dtype


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
    from flashsae.ops.decode.launch import launch_decode

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
    from flashsae.ops.decode.launch import launch_dots

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
        from flashsae.ops.decode.launch import LARGEST_FUSED_K, launch_decode_loss, launch_residual

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

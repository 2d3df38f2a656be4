"""The operators of sparse decode: how they run, what their results look like, and their backward passes.

Operators take a pattern as its tensors: latents, and starts where tokens have different numbers of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_dense, use_kernels
from flashsae.ops.decode import reference
from flashsae.ops.dense import op as dense
from flashsae.ops.gradients import collects, pattern_of, weight_gradient
from flashsae.ops.latent_rows.op import column_sums
from flashsae.ops.pattern import Pattern
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import compute_dtype


def _pattern(tensors: list[Tensor], W: Tensor, rows: Tensor) -> Pattern:
    return Pattern.of_tensors(tensors, W.shape[0], rows)


def _decode_fake(
    acts: Tensor, pattern: list[Tensor], W_dec: Tensor, b_dec: Tensor | None, rounded: bool, dtype: torch.dtype
) -> Tensor:
    return W_dec.new_empty(_pattern(pattern, W_dec, acts).B, W_dec.shape[1], dtype=dtype)


@operator(_decode_fake)
def _decode(
    acts: Tensor, pattern: list[Tensor], W_dec: Tensor, b_dec: Tensor | None, rounded: bool, dtype: torch.dtype
) -> Tensor:
    return _reconstruct(acts, _pattern(pattern, W_dec, acts), _maybe_rounded(W_dec, rounded), b_dec, dtype)


def _maybe_rounded(W_dec: Tensor, rounded: bool) -> Tensor:
    return W_dec.to(torch.bfloat16) if rounded else W_dec


def _reconstruct(acts: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    if pattern.is_full:
        W = dense.operand(W_dec, acts) if dtype == W_dec.dtype else W_dec.to(compute_dtype(acts.dtype, W_dec.dtype))
        return dense.decode(acts, pattern, W, b_dec).to(dtype)
    if not use_kernels(W_dec, acts):
        return reference.decode(acts, pattern, W_dec, b_dec).to(dtype)
    # a dense product is rounded to the dtype of W_dec, so it serves nobody who asks for more
    if dtype == W_dec.dtype and use_dense(pattern.width, W_dec.shape[0], W_dec):
        return dense.decode(acts, pattern, W_dec, b_dec).to(dtype)
    from flashsae.ops.decode.launch import launch_decode

    return launch_decode(acts, pattern, W_dec, b_dec, dtype)


def _decode_grad_acts_fake(grad_x_hat: Tensor, pattern: list[Tensor], W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_x_hat.new_empty(_pattern(pattern, W_dec, grad_x_hat).latents.shape, dtype=dtype)


@operator(_decode_grad_acts_fake)
def _decode_grad_acts(grad_x_hat: Tensor, pattern: list[Tensor], W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the activations in `dtype`, a compute dtype; 0 in places that are not used."""
    code = _pattern(pattern, W_dec, grad_x_hat)
    if code.is_full:
        W = W_dec.to(dtype) if dtype == torch.float64 else dense.operand(W_dec)
        return dense.decode_grad_acts(grad_x_hat, code, W).to(dtype)
    if dtype == torch.float64 or not use_kernels(W_dec):
        return reference.decode_grad_acts(grad_x_hat, code, W_dec, dtype)
    if use_dense(code.width, W_dec.shape[0], W_dec):
        return dense.decode_grad_acts(grad_x_hat, code, W_dec)
    from flashsae.ops.decode.launch import launch_dots

    return launch_dots(grad_x_hat, code.latents, W_dec, starts=code.starts)


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    acts, pattern, W_dec, b_dec, rounded, _ = inputs
    ctx.rounded, ctx.as_factor = rounded, collects(W_dec)
    ctx.save_for_backward(acts, W_dec, *pattern)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype


def _decode_backward(ctx: Any, grad_x_hat: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    acts, W_dec, *tensors = ctx.saved_tensors
    needs_acts, _, needs_W_dec, needs_b_dec, *_ = ctx.needs_input_grad
    grad_acts = grad_W_dec = grad_b_dec = None
    if needs_acts:
        rows = _maybe_rounded(W_dec, ctx.rounded)
        dtype = compute_dtype(acts.dtype, rows.dtype)
        grad_acts = torch.ops.flashsae.decode_grad_acts(grad_x_hat, tensors, rows, dtype).to(acts.dtype)
    if needs_W_dec:
        pattern = pattern_of(ctx, tensors, W_dec.shape[0], grad_x_hat)
        grad_W_dec, _ = weight_gradient(ctx.as_factor, pattern, acts, grad_x_hat, W_dec)
    if needs_b_dec:
        ones = grad_x_hat.new_ones(grad_x_hat.shape[0])
        grad_b_dec = column_sums(ones, grad_x_hat, ctx.bias_dtype)
    return grad_acts, [None] * len(tensors), grad_W_dec, grad_b_dec, None, None


differentiate("decode", _decode_backward, _save_decode)


def _decode_loss_fake(
    acts: Tensor,
    pattern: list[Tensor],
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_hat = W_dec.new_empty(target.shape, dtype=torch.bfloat16 if rounded else W_dec.dtype)
    dtype = compute_dtype(x_hat.dtype, acts.dtype, target.dtype)
    errors = x_hat.new_empty(target.shape[0], dtype=dtype)
    return errors, x_hat, torch.empty_like(x_hat), x_hat.new_empty(acts.shape, dtype=dtype)


@operator(_decode_loss_fake)
def _decode_loss(
    acts: Tensor,
    pattern: list[Tensor],
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_dec = _maybe_rounded(W_dec, rounded)
    code = _pattern(pattern, W_dec, acts)
    if use_kernels(W_dec, acts, target):
        from flashsae.ops.decode.launch import LARGEST_FUSED_K, launch_decode_loss, launch_residual

        if code.is_full or use_dense(code.width, code.d_sae, W_dec):
            x_hat = dense.product(acts, code, W_dec)
            errors, residual = launch_residual(x_hat, b_dec, target, token_weights)
            grad_acts = dense.decode_grad_acts(residual, code, W_dec)
            scale = -2.0 if token_weights is None else _of_entries(-2.0 * token_weights.float(), code)
            return errors, x_hat, residual, grad_acts.mul_(scale)
        if code.k is None or code.k <= LARGEST_FUSED_K:
            return launch_decode_loss(acts, code, W_dec, b_dec, target, token_weights)
    dtype = compute_dtype(W_dec.dtype, acts.dtype, target.dtype)
    x_hat = _reconstruct(acts.to(dtype), code, W_dec, b_dec, dtype)
    residual = target.to(dtype) - x_hat
    weight = torch.ones_like(residual[:, 0]) if token_weights is None else token_weights.to(dtype)
    errors = weight * residual.square().sum(1)
    grad_acts = _decode_grad_acts(residual, pattern, W_dec, dtype) * _of_entries(-2 * weight, code)
    return errors, x_hat.to(W_dec.dtype), residual.to(W_dec.dtype), grad_acts


def _of_entries(numbers: Tensor, pattern: Pattern) -> Tensor:
    """Return the number of its token for each entry, to multiply acts by: [B, 1], or [capacity], 0 if not used."""
    if pattern.starts is None:
        return numbers[:, None]
    return F.pad(numbers, (0, 1)).index_select(0, pattern.tokens)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    acts, pattern, W_dec, b_dec, target, token_weights, rounded = inputs
    residual, grad_acts = output[2], output[3]
    ctx.set_materialize_grads(False)  # only the errors have a gradient: no zeros for the rest
    ctx.as_factor, ctx.rounded = collects(W_dec), rounded
    # the gradient of a target of more bits than the residual as returned needs one that has as many
    is_wide = target.requires_grad and torch.finfo(target.dtype).eps < torch.finfo(residual.dtype).eps
    wide = (target, b_dec) if is_wide else (None, None)
    ctx.save_for_backward(acts, W_dec, residual, grad_acts, token_weights, *wide, *pattern)
    ctx.dtypes = None if b_dec is None else b_dec.dtype, target.dtype


def _loss_backward(ctx: Any, grad_errors: Tensor | None, *_others: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    acts, W_dec, residual, grad_acts, token_weights, wide_target, b_dec, *tensors = ctx.saved_tensors
    if grad_errors is None:  # nothing came from above
        return None, [None] * len(tensors), None, None, None, None, None
    needs_acts, _, needs_W_dec, needs_b_dec, needs_target, *_ = ctx.needs_input_grad
    bias_dtype, target_dtype = ctx.dtypes
    pattern = pattern_of(ctx, tensors, W_dec.shape[0], acts)
    slope = -2 * grad_errors  # of the error of each token by its residual, without the residual
    if token_weights is not None:
        slope = slope * token_weights.to(slope.dtype)
    grad_W_dec = grad_b_dec = grad_target = None
    if needs_W_dec:
        coeffs = acts.to(slope.dtype) * _of_entries(slope, pattern)
        grad_W_dec, _ = weight_gradient(ctx.as_factor, pattern, coeffs, residual, W_dec)
    if needs_b_dec:
        grad_b_dec = column_sums(slope, residual, bias_dtype)
    if needs_target:
        if wide_target is not None:
            x_hat = torch.ops.flashsae.decode(
                acts.to(slope.dtype), tensors, W_dec, b_dec, ctx.rounded, slope.dtype
            )  # fmt: skip
            residual = wide_target - x_hat
        grad_target = (residual.to(slope.dtype) * -slope[:, None]).to(target_dtype)
    needed = (grad_acts * _of_entries(grad_errors, pattern)).to(acts.dtype) if needs_acts else None
    return needed, [None] * len(tensors), grad_W_dec, grad_b_dec, grad_target, None, None


differentiate("decode_loss", _loss_backward, _save_loss)

"""The operator of several nested reconstructions: how it runs, what it returns, and its backward pass.

A code of B tokens at L levels has B·L rows: row token · L + level owns the entries that this level adds to those of the
levels before it. It comes as three tensors: latents, as the code has them; the row of each place, [capacity], int32,
ascending, B·L where it is not used; and where each row starts, [B·L + 1], int32. A full code, which has no such lists,
comes as the level of each latent, [d_sae], int32, alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.decode import reference
from flashsae.ops.dense import op as dense
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.factors import RowFactor, SparseFactor
from flashsae.ops.gradients import collects, is_dense
from flashsae.ops.latent_rows.op import column_sums, sum_rows
from flashsae.ops.pattern import Pattern
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import compute_dtype


def _by_token(lists: list[Tensor], L: int, d_sae: int, acts: Tensor) -> Pattern:
    """Return the pattern of the tokens."""
    if len(lists) == 1:
        return Pattern.full(len(acts), d_sae, device=acts.device)
    latents, _, starts = lists
    return Pattern(latents, d_sae) if latents.dim() == 2 else Pattern(latents, d_sae, starts[::L].contiguous())


def _level_of(lists: list[Tensor], L: int) -> Tensor:
    """Return the level of each place, to compare with others of the shape of acts."""
    return lists[0] if len(lists) == 1 else (lists[1] % L).view(lists[0].shape)


def _of_places(numbers: Tensor, lists: list[Tensor], L: int, acts: Tensor) -> Tensor:
    """Return the number of its token for each place, to multiply acts by: [B, 1], or [capacity]."""
    if acts.dim() == 2:
        return numbers[:, None]
    if len(numbers) == 0:
        return numbers.new_zeros(len(acts))
    return numbers[(lists[1] // L).clamp_max(len(numbers) - 1)]


def _decode_levels_fake(
    acts: Tensor,
    lists: list[Tensor],
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    level_weights: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, d), L = target.shape, level_weights.shape[0]
    x_hat = W_dec.new_empty(B, d, dtype=torch.bfloat16 if rounded else W_dec.dtype)
    dtype = compute_dtype(x_hat.dtype, acts.dtype, target.dtype)
    errors, level_errors, total = (x_hat.new_empty(*s, dtype=dtype) for s in ((B,), (B, L), (B, d)))
    grad_acts = x_hat.new_empty(acts.shape, dtype=dtype)
    return errors, level_errors, x_hat, torch.empty_like(x_hat), total, x_hat.new_empty(B * L, d), grad_acts


@operator(_decode_levels_fake)
def _decode_levels(
    acts: Tensor,
    lists: list[Tensor],
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    level_weights: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    W_dec = W_dec.to(torch.bfloat16) if rounded else W_dec
    L, dtype = len(level_weights), compute_dtype(W_dec.dtype, acts.dtype, target.dtype)
    pattern = _by_token(lists, L, len(W_dec), acts)
    if use_kernels(W_dec, acts, target) and not is_dense(W_dec, pattern):
        from flashsae.ops.decode.launch import launch_decode_levels

        found = launch_decode_levels(
            acts, (lists[0], lists[1], lists[2]), W_dec, b_dec, target, token_weights, level_weights
        )  # fmt: skip
        return (found[0] * level_weights.float()).sum(1), *found
    bias, weights = None if b_dec is None else b_dec.to(dtype), level_weights.to(dtype)
    if is_dense(W_dec, pattern):
        W, level = dense.operand(W_dec, acts, target), _level_of(lists, L)
        x_hat, residuals, sums, dots = _dense_levels(acts, (pattern, level), W, bias, target.to(dtype), weights)
    else:
        rows = Pattern(lists[0].reshape(-1), len(W_dec), lists[2])
        x_hat, residuals, sums, dots = reference.decode_levels(
            acts.reshape(-1).to(dtype), rows, W_dec.to(dtype), bias, target.to(dtype), weights
        )  # fmt: skip
    level_errors, slopes = residuals.square().sum(2), dots.new_full((len(target),), -2.0)
    if token_weights is not None:
        level_errors, slopes = level_errors * token_weights.to(dtype)[:, None], slopes * token_weights.to(dtype)
    grad_acts = dots.view(acts.shape) * _of_places(slopes, lists, L, acts)
    residual, errors = residuals[:, -1].to(W_dec.dtype, copy=True), (level_errors * weights).sum(1)
    total = sums[:, 0].clone(memory_format=torch.contiguous_format)
    sums = sums.flatten(0, 1).to(W_dec.dtype)
    return errors, level_errors, x_hat.to(W_dec.dtype), residual, total, sums, grad_acts


def _dense_levels(
    acts: Tensor, places: tuple[Pattern, Tensor], W_dec: Tensor, b_dec: Tensor | None, target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do `reference.decode_levels` with dense products, two a level; `places` are the pattern and their levels."""
    pattern, level = places
    residuals, sums = [], []
    for last in range(len(weights)):
        x_hat = dense.decode(torch.where(level <= last, acts, 0.0), pattern, W_dec, b_dec)
        residuals.append(target - x_hat)
    total = torch.zeros_like(target)
    dots = torch.zeros(acts.shape, dtype=target.dtype, device=acts.device)
    for last in reversed(range(len(weights))):
        total = total + weights[last] * residuals[last]
        sums.append(total)
        dots = torch.where(level == last, dense.decode_grad_acts(total, pattern, W_dec).to(dots.dtype), dots)
    return x_hat.to(target.dtype), torch.stack(residuals, 1), torch.stack(sums[::-1], 1), dots


def _save_levels(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    acts, lists, W_dec, b_dec, target, token_weights, level_weights, _ = inputs
    _, _, _, _, total, sums, grad_acts = output
    ctx.set_materialize_grads(False)  # only the errors have a gradient: no zeros for the rest
    ctx.as_factor, ctx.L = collects(W_dec), level_weights.shape[0]
    ctx.save_for_backward(acts, W_dec, total, sums, grad_acts, token_weights, *lists)
    ctx.dtypes = None if b_dec is None else b_dec.dtype, target.dtype


def _levels_backward(ctx: Any, grad_errors: Tensor | None, *_others: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    acts, W_dec, total, sums, grad_acts, token_weights, *lists = ctx.saved_tensors
    if grad_errors is None:  # nothing came from above
        return None, [None] * len(lists), None, None, None, None, None, None
    needs_acts, _, needs_W_dec, needs_b_dec, needs_target, *_ = ctx.needs_input_grad
    bias_dtype, target_dtype = ctx.dtypes
    slope = -2 * grad_errors  # of the error of each token by its residuals, without these
    if token_weights is not None:
        slope = slope * token_weights.to(slope.dtype)
    grad_acts_in = grad_W_dec = grad_b_dec = grad_target = None
    if needs_acts:
        grad_acts_in = (grad_acts * _of_places(grad_errors, lists, ctx.L, acts)).to(acts.dtype)
    if needs_W_dec:
        coeffs = acts.to(slope.dtype) * _of_places(slope, lists, ctx.L, acts)
        grad_W_dec = _weight_gradient(ctx, lists, coeffs, sums, W_dec)
    if needs_b_dec:
        grad_b_dec = column_sums(slope, total, bias_dtype)
    if needs_target:
        grad_target = (total * -slope[:, None]).to(target_dtype)
    return grad_acts_in, [None] * len(lists), grad_W_dec, grad_b_dec, grad_target, None, None, None


def _weight_gradient(ctx: Any, lists: list[Tensor], coeffs: Tensor, sums: Tensor, W_dec: Tensor) -> Tensor:
    """Return the gradient of W_dec: a segment sum over the rows, by the index that the tokens have."""
    L, d_sae = ctx.L, W_dec.shape[0]
    shared: Pattern | None = getattr(ctx, "pattern", None)
    pattern = _by_token(lists, L, d_sae, coeffs) if shared is None else shared
    if is_dense(sums, pattern):
        level, by_level = _level_of(lists, L), dense.operand(sums, coeffs).view(-1, L, sums.shape[1])
        parts = [
            dense.latent_rows(pattern, torch.where(level == each, coeffs, 0.0), by_level[:, each])[0]
            for each in range(L)
        ]
        grad = torch.stack([part.to(compute_dtype(part.dtype)) for part in parts]).sum(0)
        return FactoredGradient([RowFactor(grad, None)], W_dec) if ctx.as_factor else grad.to(W_dec.dtype)
    index = pattern.index
    index = index._replace(k=None, tokens=lists[1][index.entries])
    if ctx.as_factor:
        return FactoredGradient([SparseFactor(index, coeffs.reshape(-1), sums, L)], W_dec)
    return sum_rows(index, coeffs.reshape(-1), sums, W_dec.dtype)


differentiate("decode_levels", _levels_backward, _save_levels)

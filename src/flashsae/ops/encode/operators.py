"""The operators of encoding: how they run, what their results look like, and the backward pass that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.decode import reference as decode_reference
from flashsae.ops.dense import op as dense
from flashsae.ops.encode import reference
from flashsae.ops.encode.keys import Keys
from flashsae.ops.gradients import collects, pattern_of, weight_gradient
from flashsae.ops.latent_rows.op import column_sums, latent_sums
from flashsae.ops.pattern import Pattern
from flashsae.ops.register import differentiate, operator
from flashsae.ops.select import reference as select_reference
from flashsae.ops.validate import compute_dtype
from flashsae.precision import is_rounded


def _with_centred(result: list[Tensor], x: Tensor, b_dec: Tensor | None, precision: str) -> list[Tensor]:
    """Return fake results, and behind them what the backward pass keeps of x where it is not x itself."""
    return result if b_dec is None else [*result, x.new_empty(x.shape, dtype=_centred_dtype(x, precision))]


def _fake_selection(of: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return the fake of an operator that selects.

    Args:
        of: from x and what is wanted to a fake code.
    """

    def fake(x: Tensor, _W: Tensor, _b_enc: Tensor, b_dec: Tensor | None, *by: Any) -> list[Tensor]:
        _by, wanted, precision, _noise = by
        return _with_centred(of(x, wanted), x, b_dec, precision)

    return fake


def _fixed_fake(x: Tensor, wanted: list[int]) -> list[Tensor]:
    shape = x.shape[0], wanted[0]
    return [x.new_empty(shape, dtype=compute_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)]


@operator(_fake_selection(_fixed_fake))
def _encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
    wanted: list[int],  # k, 1 if selected by magnitude, and `Memory`
    precision: str,
    noise: Tensor | None,
) -> list[Tensor]:
    k, magnitude, *memory = wanted
    centred, keys = _centred(x, b_dec, precision), Keys.marked(b_enc, key_scale, bool(magnitude))
    if use_kernels(x):
        from flashsae.ops.encode.launch import launch_encode_topk

        code = launch_encode_topk(centred, W_enc_T, keys, k, precision, memory, noise=noise)
    else:
        code = reference.encode_topk(centred, W_enc_T, keys, k, memory[0])
    return [*code, *([] if b_dec is None else [centred])]


@operator(_fake_selection(lambda x, wanted: _varying_fake(x, x.shape[0] * wanted[0])))
def _encode_batch_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
    wanted: list[int],  # k, 1 if selected by magnitude, and `Memory`
    precision: str,
    noise: Tensor | None,
) -> list[Tensor]:
    k, magnitude, *memory = wanted
    centred, keys = _centred(x, b_dec, precision), Keys.marked(b_enc, key_scale, bool(magnitude))
    if use_kernels(x):
        from flashsae.ops.select.launch import batch_topk

        latents, starts, acts = batch_topk(centred, W_enc_T, keys, k, precision, memory, noise=noise)
    else:
        latents, starts, acts = select_reference.batch_topk(centred, W_enc_T, keys, k, memory[0])
    return [acts, latents, starts, *([] if b_dec is None else [centred])]


def _above_fake(x: Tensor, wanted: list[int]) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if wanted[0] < 0 else wanted[0]
    return [*_varying_fake(x, size), x.new_empty((), dtype=torch.int64)]


@operator(_fake_selection(_above_fake))
def _encode_above(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor,
    wanted: list[int],  # places there are, -1 for as many as are needed, and `Memory`
    precision: str,
    noise: Tensor | None,
) -> list[Tensor]:
    (places, *memory), centred = wanted, _centred(x, b_dec, precision)
    capacity = None if places < 0 else places
    if use_kernels(x):
        from flashsae.ops.select.launch import above

        found = above(centred, W_enc_T, b_enc, threshold, capacity, precision, memory, noise=noise)
    else:
        found = select_reference.above(centred, W_enc_T, b_enc, threshold, capacity, memory[0])
    latents, starts, acts, count = found
    return [acts, latents, starts, count, *([] if b_dec is None else [centred])]


def _encode_any_fake(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor,
    wanted: list[int],  # a limit, and `Memory`
    precision: str,
    noise: Tensor | None,
) -> list[Tensor]:
    values, latents, starts = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))
    result = [
        x.new_empty(values, dtype=compute_dtype(x.dtype)),
        x.new_empty(latents, dtype=torch.int32),
        x.new_empty(starts, dtype=torch.int32),
    ]
    return _with_centred(result, x, b_dec, precision)


@operator(_encode_any_fake)
def _encode_any(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor,
    wanted: list[int],  # a limit, and `Memory`
    precision: str,
    noise: Tensor | None,
) -> list[Tensor]:
    """Return values, latents and starts of all above a threshold; where these are more than a limit all values, alone.

    All values are flat as well, and latents and starts are empty then.
    """
    (limit, *memory), centred = wanted, _centred(x, b_dec, precision)
    if use_kernels(x):
        from flashsae.ops.select.launch import above

        found = above(centred, W_enc_T, b_enc, threshold, None, precision, memory, limit, noise)
    else:
        found = select_reference.above(centred, W_enc_T, b_enc, threshold, None, memory[0], limit)
    latents, starts, values, _ = found
    return [values, latents, starts, *([] if b_dec is None else [centred])]


def _varying_fake(x: Tensor, size: int | torch.SymInt) -> list[Tensor]:
    """Return fake values, latents and starts of a code of varying length."""
    places = x.new_empty(size, dtype=torch.int32)
    return [x.new_empty(size, dtype=compute_dtype(x.dtype)), places, x.new_empty(x.shape[0] + 1, dtype=torch.int32)]


def _center_fake(x: Tensor, b_dec: Tensor, rounded: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if rounded else compute_dtype(x.dtype))


@operator(_center_fake)
def _center(x: Tensor, b_dec: Tensor, rounded: bool) -> Tensor:
    if use_kernels(x):
        from flashsae.ops.encode.launch import launch_center

        return launch_center(x, b_dec, torch.bfloat16 if rounded else torch.float32)
    return reference.center(x, b_dec).to(torch.bfloat16 if rounded else compute_dtype(x.dtype))


def _centred(x: Tensor, b_dec: Tensor | None, precision: str) -> Tensor:
    """Return x - b_dec in the precision of the product; the CPU computes in float32 or better whatever is asked."""
    dtype = _centred_dtype(x, precision)
    if b_dec is None:
        return x.to(dtype)
    centred: Tensor = torch.ops.flashsae.center(x, b_dec, dtype == torch.bfloat16)
    return centred


def _centred_dtype(x: Tensor, precision: str) -> torch.dtype:
    return torch.bfloat16 if is_rounded(precision) and x.is_cuda else compute_dtype(x.dtype)


def _pre_acts_fake(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None, pattern: list[Tensor], precision: str
) -> list[Tensor]:
    shape = Pattern.of_tensors(pattern, len(W_enc_T), x).latents.shape
    values = x.new_empty(shape, dtype=compute_dtype(x.dtype))
    return _with_centred([values], x, b_dec, precision)


@operator(_pre_acts_fake)
def _pre_acts(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None, pattern: list[Tensor], precision: str
) -> list[Tensor]:
    code = Pattern.of_tensors(pattern, len(W_enc_T), x)
    centred = _centred(x, b_dec, precision)
    if code.is_full:
        return [dense.pre_acts(centred, W_enc_T, b_enc, precision), *([] if b_dec is None else [centred])]
    if use_kernels(x):
        from flashsae.ops.decode.launch import launch_dots

        rows = centred.to(torch.bfloat16) if is_rounded(precision) else centred
        weights = W_enc_T.to(torch.bfloat16) if is_rounded(precision) else W_enc_T
        values = launch_dots(rows, code.latents, weights, starts=code.starts)
    else:
        values = decode_reference.decode_grad_acts(centred, code, W_enc_T, compute_dtype(x.dtype))
    values = values + _per_latent(b_enc.to(values.dtype), pattern)
    return [values, *([] if b_dec is None else [centred])]


def _per_latent_fake(values: Tensor, pattern: list[Tensor]) -> Tensor:
    return values.new_empty(pattern[0].shape)


@operator(_per_latent_fake)
def _per_latent(values: Tensor, pattern: list[Tensor]) -> Tensor:
    if len(pattern) == 1:
        return values[pattern[0].long()]
    return F.pad(values, (0, 1)).index_select(0, pattern[0])  # places that are not used hold d_sae


def _save_per_latent(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, pattern = inputs
    ctx.save_for_backward(*pattern)
    ctx.d_sae, ctx.dtype = len(values), values.dtype


def _per_latent_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None]]:
    tensors = ctx.saved_tensors
    sums = latent_sums(pattern_of(ctx, tensors, ctx.d_sae, grad).index, grad)
    return sums.to(ctx.dtype), [None] * len(tensors)


differentiate("per_latent", _per_latent_backward, _save_per_latent)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor], tensors: list[Tensor], precision: str) -> None:
    """Keep what the backward pass of selected pre-activations needs; `tensors` are those of the pattern."""
    x, W_enc_T, b_enc, b_dec = inputs[:4]
    ctx.save_for_backward(x if b_dec is None else output[-1], W_enc_T, *tensors)
    ctx.bias_dtypes = b_enc.dtype, None if b_dec is None else b_dec.dtype
    ctx.as_factor, ctx.x_dtype, ctx.precision = collects(W_enc_T), x.dtype, precision
    ctx.set_materialize_grads(False)  # the pattern has no gradient: no zeros for it


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_enc_T, b_enc and b_dec."""
    centred, W_enc_T, *tensors = ctx.saved_tensors
    grad_pre = grads[0]
    if grad_pre is None:
        return None, None, None, None
    pattern = pattern_of(ctx, tensors, len(W_enc_T), centred)
    grad_pre = grad_pre.reshape(pattern.latents.shape)  # that of `encode_any` is flat, of a full code too
    needs_x, needs_W, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
    grad_x = grad_W = grad_b_enc = grad_b_dec = None
    if needs_x:
        grad_x = torch.ops.flashsae.decode(grad_pre, tensors, W_enc_T, None, False, ctx.x_dtype)
    if needs_W or needs_b_enc or needs_b_dec:
        sums = None
        if needs_W:
            rows = _centred(centred, None, ctx.precision)
            grad_W, sums = weight_gradient(ctx.as_factor, pattern, grad_pre, rows, W_enc_T, with_sums=True)
        if sums is None:
            sums = grad_pre.sum(0) if pattern.is_full else latent_sums(pattern.index, grad_pre)
        grad_b_enc = sums.to(ctx.bias_dtypes[0]) if needs_b_enc else None
        if needs_b_dec:
            # Σ over tokens of -grad_pre @ W_enc_T, summed over tokens first: d_sae·d_in instead of B·k·d_in
            grad_b_dec = column_sums(-sums, W_enc_T, ctx.bias_dtypes[1])
    return grad_x, grad_W, grad_b_enc, grad_b_dec


def differentiate_selection(name: str, parts: int) -> None:
    """Give an operator that selects its backward pass.

    Args:
        name: of the operator, whose arguments begin with x, W_enc_T, b_enc, b_dec and whose last but one is precision.
        parts: how many results behind the values make the pattern.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors = output[1 : 1 + parts]
        is_full = tensors[-1].numel() == 0 and len(tensors) == 2  # starts have a number more than there are tokens
        _save(ctx, inputs, output, [] if is_full else tensors, inputs[-2])

    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grads), None, None, None, None)

    differentiate(name, backward, save)


def _save_pre_acts(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _save(ctx, inputs, output, inputs[4], inputs[5])


def _pre_acts_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return (*_backward(ctx, grads), [None] * len(ctx.saved_tensors[2:]), None)


differentiate_selection("encode_topk", parts=1)
differentiate_selection("encode_batch_topk", parts=2)
differentiate_selection("encode_above", parts=2)
differentiate_selection("encode_any", parts=2)
differentiate("pre_acts", _pre_acts_backward, _save_pre_acts)

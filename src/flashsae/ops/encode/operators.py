"""The operator of encode and select: how it runs, what its results look like, and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.encode import reference
from flashsae.ops.gradients import collects, is_dense, weight_gradient
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows.op import column_sums, latent_sums
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import compute_dtype


def is_scale(key_scale: Tensor) -> Tensor:
    """Tell which numbers keep the order of what they multiply."""
    return (key_scale >= 0) & (key_scale < torch.inf)


def _encode_topk_fake(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    precision: str,
    workspace_bytes: int,
    with_index: bool,
) -> list[Tensor]:
    B, dtype = x.shape[0], compute_dtype(x.dtype)
    result = []
    for kept in (k, k_aux):
        result += [x.new_empty(B, kept, dtype=dtype), x.new_empty(B, kept, dtype=torch.int64)]
    if with_index:
        result += [x.new_empty(B * k, dtype=torch.int64), x.new_empty(B * k, dtype=torch.int32)]
        result += [x.new_empty(W_enc_T.shape[0] + 1, dtype=torch.int32)]
    if b_dec is not None:
        result.append(x.new_empty(x.shape, dtype=_centred_dtype(x, precision)))
    return result


@operator(_encode_topk_fake)  # its arguments are flat, because operators take no dataclasses
def _encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    precision: str,
    workspace_bytes: int,
    with_index: bool,
) -> list[Tensor]:
    centred = _centred(x, b_dec, precision)
    if key_scale is not None:
        b_enc = torch.where(is_scale(key_scale), b_enc, torch.nan)  # without a wait: what is wrong shows
    choices = [(k, None), *([(k_aux, aux_mask)] if k_aux else [])]
    if use_kernels(x):
        from flashsae.ops.encode.launch import launch_encode_topk

        codes = launch_encode_topk(centred, W_enc_T, b_enc, choices, key_scale, precision, workspace_bytes)
    else:
        codes = reference.encode_topk(centred, W_enc_T, b_enc, choices, key_scale, workspace_bytes)
    if not k_aux:
        codes.append((codes[0][0].new_empty(len(x), 0), codes[0][1].new_empty(len(x), 0)))
    index = list(build_index(codes[0][1], len(W_enc_T))[:3]) if with_index else []
    return [*codes[0], *codes[1], *index, *([] if b_dec is None else [centred])]


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
    return torch.bfloat16 if precision == "bf16" and x.is_cuda else compute_dtype(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, W_enc_T, b_enc, b_dec, _, _, _, k_aux, precision, _, with_index = inputs
    codes, lists = output[: 4 if k_aux else 2], output[4:7] if with_index else []
    centred = x if b_dec is None else output[-1]
    ctx.save_for_backward(centred, W_enc_T, *codes, *lists)
    ctx.k_aux, ctx.with_index, ctx.x_dtype = k_aux, with_index, x.dtype
    ctx.bias_dtypes = b_enc.dtype, None if b_dec is None else b_dec.dtype
    ctx.as_factor = collects(W_enc_T)
    ctx.set_materialize_grads(False)  # the indices have none: no zeros for them
    ctx.precision = precision


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    centred, W_enc_T, top_acts, top_indices, *rest = ctx.saved_tensors
    grad_acts = torch.zeros_like(top_acts) if grads[0] is None else grads[0]
    if ctx.k_aux:
        # both selections are one code of k + k_aux entries a token
        grad_acts = torch.cat([grad_acts, torch.zeros_like(rest[0]) if grads[2] is None else grads[2]], 1)
        top_acts, top_indices = torch.cat([top_acts, rest[0]], 1), torch.cat([top_indices, rest[1]], 1)
    # not where(top_acts > 0): a NaN must stay visible in the gradient
    grad_pre = torch.where(top_acts == 0, 0.0, grad_acts)
    needs_x, needs_W, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
    grad_x = grad_W = grad_b_enc = grad_b_dec = None
    if needs_x:
        grad_x = torch.ops.flashsae.decode_sparse(grad_pre, top_indices, W_enc_T, None, [], False, ctx.x_dtype)
    if needs_W or needs_b_enc or needs_b_dec:
        k, rows = top_indices.shape[1], _centred(centred, None, ctx.precision)
        index = sums = None
        if not is_dense(rows, k, len(W_enc_T)):
            has_index = ctx.with_index and not ctx.k_aux
            index = LatentIndex(rest[0], rest[1], rest[2], k) if has_index else build_index(top_indices, len(W_enc_T))
        if needs_W:
            grad_W, sums = weight_gradient(ctx.as_factor, top_indices, index, grad_pre, rows, W_enc_T, with_sums=True)
        if sums is None:
            sums = latent_sums(index or build_index(top_indices, len(W_enc_T)), grad_pre)
        grad_b_enc = sums.to(ctx.bias_dtypes[0]) if needs_b_enc else None
        if needs_b_dec:
            # Σ over tokens of -grad_pre @ W_enc_T, summed over tokens first: d_sae·d_in instead of B·k·d_in
            grad_b_dec = column_sums(-sums, W_enc_T, ctx.bias_dtypes[1])
    return grad_x, grad_W, grad_b_enc, grad_b_dec, None, None, None, None, None, None, None


differentiate("encode_topk", _backward, _save)

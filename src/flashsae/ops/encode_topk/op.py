"""Encode and select: from activations to the k active latents of each token, dense pre-activations never whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.errors import ConfigError, DtypeError
from flashsae.ops.encode_topk import reference
from flashsae.ops.gradients import collects, is_dense, weight_gradient
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows.op import column_sums, latent_sums
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import (
    Precision,
    as_int,
    check_constant,
    check_device,
    check_float,
    check_k,
    check_precision,
    check_shape,
    compute_dtype,
    has_values,
)


@overload
def encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = ...,
    key_scale: Tensor | None = ...,
    precision: Precision | None = ...,
    workspace_bytes: int = ...,
    return_index: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = ...,
    key_scale: Tensor | None = ...,
    precision: Precision | None = ...,
    workspace_bytes: int = ...,
    return_index: Literal[True],
) -> tuple[Tensor, Tensor, LatentIndex]: ...


def encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    key_scale: Tensor | None = None,
    precision: Precision | None = None,
    workspace_bytes: int = reference.WORKSPACE_BYTES,
    return_index: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LatentIndex]:
    """Encode tokens and keep the k largest latents of each.

        pre_acts = (x - b_dec) @ W_enc_T.T + b_enc;   top_acts = relu(the k largest of each row of pre_acts)

    Args:
        x: [B, d_in], float.
        W_enc_T: [d_sae, d_in], dtype of x, or bfloat16. One row a latent.
        b_enc: [d_sae], dtype of x, or float32.
        k: latents to keep, 1 <= k <= d_sae; at most 1024 on a GPU.
        b_dec: [d_in], dtype of x, or float32; subtracted from x first. None for no subtraction.
        key_scale: [d_sae], float, finite and >= 0: select by pre_acts * key_scale, as with the norms of decoder rows.
            The values returned are not scaled. None: 1 each. Others are refused on the CPU; on a GPU, where looking
            would make the host wait, such a latent is selected for every token with the value NaN.
        precision: of the product, on a GPU. "float32": certified, the selection is that of float32 arithmetic at
            about the price of a float16 product; "tf32", "bf16": operands rounded to that, accumulated in float32.
            None: "bf16" for bfloat16 weights, "float32" for the others. The CPU and float64 ignore it.
        workspace_bytes: bound on the pre-activations in memory at once; a single row may exceed it.
        return_index: also return the index of the selection, for `decode_sparse` and `decode_loss`, so that it is
            built once a step.
    Returns:
        top_acts: [B, k], float32 (float64 for float64), >= 0.
        top_indices: [B, k], int64, in [0, d_sae), ascending within a row. If fewer than k pre-activations of a
            token are positive, the others are selected with the value 0.
        index: with `return_index`.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
        GradientError: key_scale requires a gradient.
    Numerics: products accumulated in float32 (float64 for float64). Exact selection among those values; of equal
        values the lowest index wins. A NaN in a row of x gives NaN values in that row and valid indices. float16
        tensors are widened to float32. Two runs give the same bits. docs/numerics.md#certified-float32.
    Gradients: x, W_enc_T (as a factor, where `collect_factors` asked for it), b_enc and b_dec, through the selected
        latents whose value is above 0 only (top-k, then ReLU; 0 at 0). That of b_dec costs d_sae·d_in, not B·k·d_in.
        Once differentiable.
    Cost: 2·B·d_in·d_sae FLOPs forward; backward 2·B·k·d_in for each of x and W_enc_T. Memory beyond the result:
        workspace_bytes, an eighth of it for group maxima, and copies of x and W_enc_T where they are rounded.
    Source: Makhzani and Frey 2013 (k-sparse autoencoders); Gao et al. 2024, eq. 4; selection and backward ours,
        docs/methodology.md#exact-selection.
    """
    d_sae, workspace_bytes = _check(x, W_enc_T, b_enc, b_dec, key_scale, workspace_bytes)
    k = check_k(k, d_sae)
    chosen = _resolve(precision, W_enc_T)
    result = torch.ops.flashsae.encode_topk(
        x, W_enc_T, b_enc, b_dec, key_scale, None, k, 0, chosen, workspace_bytes, return_index
    )
    top_acts, top_indices, _, _, *lists = result  # the last of these may be the centred tokens
    if return_index:
        return top_acts, top_indices, LatentIndex(lists[0], lists[1], lists[2], k).of(top_indices)
    return top_acts, top_indices


class TwoCodes(NamedTuple):
    """What `encode_topk_aux` returns: the code, and that among the allowed latents.

    Args:
        top_acts, top_indices: [B, k], as from `encode_topk`.
        aux_acts, aux_indices: [B, k_aux], the same among the latents that the mask allows.
    """

    top_acts: Tensor
    top_indices: Tensor
    aux_acts: Tensor
    aux_indices: Tensor


def encode_topk_aux(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    aux_mask: Tensor,
    k_aux: int,
    *,
    b_dec: Tensor | None = None,
    key_scale: Tensor | None = None,
    precision: Precision | None = None,
    workspace_bytes: int = reference.WORKSPACE_BYTES,
) -> TwoCodes:
    """Do `encode_topk`, and from the same pre-activations a second selection among some latents, as AuxK needs it.

    Args:
        aux_mask: [d_sae], bool: the latents to choose from, such as the dead ones. How many there are need not be
            known: if fewer than k_aux, the lowest of the others fill up, with the value 0 and no gradient.
        k_aux: latents to keep of them, 1 <= k_aux <= d_sae; at most 1024 on a GPU.
        others: as in `encode_topk`.
    Returns:
        both codes.
    Raises, Numerics, Source: as in `encode_topk`; Gao et al. 2024, appendix A.2.
    Gradients: as in `encode_topk`, through both codes.
    Cost: that of `encode_topk` and a second reading of the pre-activations.
    """
    d_sae, workspace_bytes = _check(x, W_enc_T, b_enc, b_dec, key_scale, workspace_bytes)
    check_shape("aux_mask", aux_mask, (d_sae,))
    check_device("aux_mask", aux_mask, x, "x")
    if aux_mask.dtype != torch.bool:
        raise DtypeError(f"aux_mask: expected torch.bool, got {aux_mask.dtype}.")
    k, k_aux = check_k(k, d_sae), check_k(k_aux, d_sae, "k_aux")
    chosen = _resolve(precision, W_enc_T)
    result = torch.ops.flashsae.encode_topk(
        x, W_enc_T, b_enc, b_dec, key_scale, aux_mask, k, k_aux, chosen, workspace_bytes, False
    )
    return TwoCodes(*result[:4])


def _check(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
    workspace_bytes: int,
) -> tuple[int, int]:
    """Raise unless the arguments fit each other; return d_sae and workspace_bytes."""
    check_shape("W_enc_T", W_enc_T, ("d_sae", "d_in"))
    d_sae, d_in = W_enc_T.shape
    check_shape("x", x, ("B", d_in))
    check_shape("b_enc", b_enc, (d_sae,))
    check_float("x", x)
    check_float("W_enc_T", W_enc_T, x, "x", or_dtype=torch.bfloat16)
    check_float("b_enc", b_enc, x, "x", or_dtype=torch.float32)
    if b_dec is not None:
        check_shape("b_dec", b_dec, (d_in,))
        check_float("b_dec", b_dec, x, "x", or_dtype=torch.float32)
    if key_scale is not None:
        check_shape("key_scale", key_scale, (d_sae,))
        check_float("key_scale", key_scale)
        check_device("key_scale", key_scale, x, "x")
        check_constant("key_scale", key_scale)
        if key_scale.device.type == "cpu" and has_values(key_scale) and not bool(_is_scale(key_scale).all()):
            raise ConfigError("key_scale: expected finite numbers >= 0, got negative ones, NaN or infinity.")
    workspace_bytes = as_int("workspace_bytes", workspace_bytes)
    if workspace_bytes <= 0:
        raise ConfigError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}.")
    return d_sae, workspace_bytes


def _is_scale(key_scale: Tensor) -> Tensor:
    """Tell which numbers keep the order of what they multiply."""
    return (key_scale >= 0) & (key_scale < torch.inf)


def _resolve(precision: Precision | None, W_enc_T: Tensor) -> Precision:
    check_precision(precision)
    return precision or ("bf16" if W_enc_T.dtype == torch.bfloat16 else "float32")


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
        b_enc = torch.where(_is_scale(key_scale), b_enc, torch.nan)  # without a wait: what is wrong shows
    choices = [(k, None), *([(k_aux, aux_mask)] if k_aux else [])]
    if use_kernels(x):
        from flashsae.ops.encode_topk.launch import launch_encode_topk

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
        from flashsae.ops.encode_topk.launch import launch_center

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

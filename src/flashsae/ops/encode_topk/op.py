"""Encode and select: from activations to the k active latents of each token, dense pre-activations never whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashsae.errors import ConfigError
from flashsae.ops.decode_sparse.reference import decode_sparse
from flashsae.ops.encode_topk import reference
from flashsae.ops.index import build_index
from flashsae.ops.latent_rows.reference import latent_rows, latent_sums
from flashsae.ops.validate import check_float, check_indices, check_k, check_shape


def encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    latents: Tensor | None = None,
    workspace_bytes: int = reference.WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """Encode tokens and keep the k largest latents of each.

        pre_acts = (x - b_dec) @ W_enc_T.T + b_enc;   top_acts = relu(the k largest of each row of pre_acts)

    Args:
        x: [B, d_in], float.
        W_enc_T: [d_sae, d_in], dtype of x. One row a latent.
        b_enc: [d_sae], dtype of x.
        k: latents to keep, 1 <= k <= number of latents to choose from.
        b_dec: [d_in], dtype of x, subtracted from x first; None for no subtraction.
        latents: [m], int64, distinct and ascending: choose among these only, as AuxK does among dead latents.
            None: all.
        workspace_bytes: bound on the pre-activations (and copies of them) in memory at once; a single row may
            exceed it.
    Returns:
        top_acts: [B, k], float32 (float64 for float64), >= 0.
        top_indices: [B, k], int64, in [0, d_sae), ascending within a row. If fewer than k pre-activations of a
            token are positive, the others are selected with the value 0.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
    Numerics: products accumulated in float32 (float64 for float64). Exact selection among those values; of equal
        values the lowest index wins. A NaN in a row of x gives NaN values in that row and valid indices.
    Gradients: x, W_enc_T, b_enc and b_dec, through the selected latents whose value is above 0 only (top-k, then
        ReLU; 0 at 0). That of b_dec costs d_sae·d_in, not B·k·d_in. Once differentiable.
    Cost: 2·B·d_in·d_sae FLOPs forward; backward 2·B·k·d_in for each of x and W_enc_T. Memory beyond the result:
        workspace_bytes.
    Source: Makhzani and Frey 2013 (k-sparse autoencoders); Gao et al. 2024, eq. 4; chunking and backward ours,
        docs/methodology.md#sparse-backward.
    """
    _check(x, W_enc_T, b_enc, b_dec)
    if latents is not None:
        check_shape("latents", latents, ("m",))
        check_indices("latents", latents, W_enc_T.shape[0])
    check_k(k, W_enc_T.shape[0] if latents is None else len(latents))
    if workspace_bytes <= 0:
        raise ConfigError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}.")
    top_acts, top_indices = _EncodeTopK.apply(x, W_enc_T, b_enc, k, b_dec, latents, workspace_bytes)  # type: ignore[no-untyped-call]
    return top_acts, top_indices


def _check(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    check_shape("W_enc_T", W_enc_T, ("d_sae", "d_in"))
    d_sae, d_in = W_enc_T.shape
    check_shape("x", x, ("B", d_in))
    check_shape("b_enc", b_enc, (d_sae,))
    check_float("x", x)
    check_float("W_enc_T", W_enc_T, x, "x")
    check_float("b_enc", b_enc, x, "x")
    if b_dec is not None:
        check_shape("b_dec", b_dec, (d_in,))
        check_float("b_dec", b_dec, x, "x")


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc_T: Tensor,
        b_enc: Tensor,
        k: int,
        b_dec: Tensor | None,
        latents: Tensor | None,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        rows, bias = (W_enc_T, b_enc) if latents is None else (W_enc_T[latents], b_enc[latents])
        top_acts, top_indices = reference.encode_topk(x, rows, bias, k, b_dec, workspace_bytes)
        if latents is not None:
            top_indices = latents.to(torch.int64)[top_indices]
        ctx.save_for_backward(x, W_enc_T, b_dec, top_acts, top_indices)
        ctx.bias_dtype = b_enc.dtype
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_top_acts: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc_T, b_dec, top_acts, top_indices = ctx.saved_tensors
        needs_x, needs_W, needs_b_enc, _, needs_b_dec, _, _ = ctx.needs_input_grad
        # not where(top_acts > 0): a NaN must stay visible in the gradient
        grad_pre = torch.where(top_acts == 0, 0.0, grad_top_acts)
        grad_x = grad_W = grad_b_enc = grad_b_dec = None
        if needs_x:
            grad_x = decode_sparse(grad_pre, top_indices, W_enc_T, None).to(x.dtype)
        if needs_W or needs_b_enc or needs_b_dec:
            index = build_index(top_indices, W_enc_T.shape[0])
            sums = latent_sums(index, grad_pre)
            grad_b_enc = sums.to(ctx.bias_dtype)
            if needs_W:
                grad_W = latent_rows(index, grad_pre, reference.center(x, b_dec)).to(W_enc_T.dtype)
            if needs_b_dec:
                # Σ over tokens of -grad_pre @ W_enc_T, summed over tokens first: d_sae·d_in instead of B·k·d_in
                grad_b_dec = -(sums @ W_enc_T.to(sums.dtype)).to(b_dec.dtype)
        return grad_x, grad_W, grad_b_enc, None, grad_b_dec, None, None

"""Sparse decode: the reconstruction from k latents a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashsae.errors import ShapeError
from flashsae.ops.decode_sparse import reference
from flashsae.ops.index import build_index
from flashsae.ops.latent_rows.reference import latent_rows
from flashsae.ops.validate import check_float, check_indices, check_shape


def decode_sparse(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruct tokens from their k active latents.

        x_hat[b] = Σ over j of top_acts[b, j] · W_dec[top_indices[b, j]] + b_dec

    Args:
        top_acts: [B, k], float, same scale as x. Need not be sorted.
        top_indices: [B, k], int32 | int64, each in [0, d_sae). Repeats within a row add up.
        W_dec: [d_sae, d_in], float.
        b_dec: [d_in], dtype of W_dec, or None for no bias.
    Returns:
        x_hat: [B, d_in], dtype of W_dec.
    Raises:
        ShapeError, DtypeError: names the argument, the expected and the actual shape or dtype.
    Numerics: deterministic on the CPU; accumulated in float32 (float64 for float64), rounded once.
    Gradients: top_acts, W_dec and b_dec; those of W_dec are segment sums over the active latents only. Once
        differentiable.
    Cost: B·k·d_in multiply-adds forward, twice that backward, whatever d_sae.
    Source: ours, docs/methodology.md#sparse-decode.
    """
    check_shape("W_dec", W_dec, ("d_sae", "d_in"))
    check_shape("top_indices", top_indices, ("B", "k"))
    if 0 in (top_indices.shape[1], W_dec.shape[1]):
        raise ShapeError(f"k and d_in: expected at least 1, got {top_indices.shape[1]} and {W_dec.shape[1]}.")
    check_shape("top_acts", top_acts, tuple(top_indices.shape))
    check_float("W_dec", W_dec)
    check_float("top_acts", top_acts)
    check_indices("top_indices", top_indices, W_dec.shape[0])
    if b_dec is not None:
        check_shape("b_dec", b_dec, (W_dec.shape[1],))
        check_float("b_dec", b_dec, W_dec, "W_dec")
    x_hat: Tensor = _DecodeSparse.apply(top_acts, top_indices, W_dec, b_dec)  # type: ignore[no-untyped-call]
    return x_hat


class _DecodeSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        ctx.bias_dtype = None if b_dec is None else b_dec.dtype
        return reference.decode_sparse(top_acts, top_indices, W_dec, b_dec).to(W_dec.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_hat: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        top_acts, top_indices, W_dec = ctx.saved_tensors
        needs_acts, _, needs_W_dec, needs_b_dec = ctx.needs_input_grad
        grad_acts = grad_W_dec = grad_b_dec = None
        if needs_acts:
            grad_acts = reference.decode_sparse_grad_acts(grad_x_hat, top_indices, W_dec).to(top_acts.dtype)
        if needs_W_dec:
            index = build_index(top_indices, W_dec.shape[0])
            grad_W_dec = latent_rows(index, top_acts, grad_x_hat).to(W_dec.dtype)
        if needs_b_dec:
            grad_b_dec = grad_x_hat.sum(0, dtype=torch.promote_types(grad_x_hat.dtype, torch.float32))
            grad_b_dec = grad_b_dec.to(ctx.bias_dtype)
        return grad_acts, None, grad_W_dec, grad_b_dec

"""Sparse decode and the gradient of its activations, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import compute_dtype, packed
from flashsae.shapes import Activations, CodeActs, InputBias, Weights


def decode(acts: CodeActs, pattern: Pattern, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Weighted sum of decoder rows: the code, [d_sae, d_in], [d_in] -> [B, d_in], in the compute dtype."""
    dtype = compute_dtype(acts.dtype, W_dec.dtype)
    if pattern.B == 0:
        return W_dec.new_zeros(0, W_dec.shape[1], dtype=dtype)
    if pattern.k == 0:  # which embedding_bag refuses
        x_hat = W_dec.new_zeros(pattern.B, W_dec.shape[1], dtype=dtype)
    elif pattern.starts is None:
        acts, latents = packed(acts.to(dtype), pattern.latents)
        x_hat = F.embedding_bag(latents, W_dec.to(dtype), mode="sum", per_sample_weights=acts)
    else:
        used = _used(pattern.starts)
        acts, latents = packed(acts.to(dtype)[:used], pattern.latents[:used])
        x_hat = W_dec.new_zeros(pattern.B, W_dec.shape[1], dtype=dtype)
        if used:
            x_hat = F.embedding_bag(
                latents, W_dec.to(dtype), pattern.starts[:-1].to(latents.dtype), mode="sum", per_sample_weights=acts
            )  # fmt: skip
    return x_hat if b_dec is None else x_hat + b_dec.to(dtype)


def decode_grad_acts(grad_x_hat: Activations, pattern: Pattern, W_dec: Weights, dtype: torch.dtype) -> CodeActs:
    """Dot product of each selected decoder row with its token's gradient: of the shape of acts, in `dtype`."""
    device, latents, tokens = W_dec.device, pattern.latents.flatten(), pattern.tokens.long()
    if pattern.starts is None:
        starts = torch.arange(pattern.B, dtype=torch.int64, device=device) * pattern.latents.shape[1]
    else:
        used = _used(pattern.starts)
        latents, tokens, starts = latents[:used], tokens[:used], pattern.starts[:-1].long()
    # what autograd does for the weights of an embedding bag: dot products where the rows lie, without a copy of them
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_x_hat.to(dtype), W_dec.to(dtype), packed(latents).long(), starts, tokens, 0
    )
    if pattern.starts is None:
        return dots.view(pattern.latents.shape)
    return F.pad(dots, (0, pattern.capacity - used))


def decode_levels(
    acts: CodeActs, rows: Pattern, W_dec: Weights, b_dec: InputBias | None, target: Activations, level_weights: Tensor
) -> tuple[Activations, Tensor, Tensor, CodeActs]:
    """Decode each token at L levels, each of the entries of the one before it and its own.

    Args:
        acts: [capacity], by token, then by level.
        rows: pattern of B·L rows: the entries that each level of each token adds.
        W_dec, b_dec, target: [d_sae, d_in], [d_in], [B, d_in], of the dtype that is computed in.
        level_weights: [L], of this dtype.
    Returns:
        x_hat of all entries [B, d_in]; the residual of each level [B, L, d_in]; Σ of weight · residual over each level
        and those behind it, as large; and the dot products of these with the decoder rows of their entries [capacity].
    """
    B, L, d = len(target), len(level_weights), W_dec.shape[1]
    x_hats = decode(acts, rows, W_dec, None).view(B, L, d).cumsum_(1)
    if b_dec is not None:
        x_hats += b_dec
    residuals = target[:, None] - x_hats
    sums = residuals * level_weights[:, None]
    for level in reversed(range(L - 1)):
        sums[:, level] += sums[:, level + 1]
    dots = decode_grad_acts(sums.view(B * L, d), rows, W_dec, W_dec.dtype)
    return x_hats[:, -1].clone(), residuals, sums, dots


def _used(starts: Tensor) -> int:
    """Return how many places of a code are used. Waits for a GPU, as the reference may."""
    return int(starts[-1])

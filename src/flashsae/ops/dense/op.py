"""The same operations as dense matrix products, for codes so dense that gathering rows no longer pays.

Of a full code (`Pattern.full`) they are what the operations are, on every device: its acts are the dense code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import compute_dtype
from flashsae.precision import is_rounded
from flashsae.profiling import part
from flashsae.shapes import (
    Activations,
    CodeActs,
    InputBias,
    LatentActs,
    LatentBias,
    TopActs,
    TopIndices,
    Weights,
)

_CODE_ELEMENTS = 1 << 26  # of the dense code in memory at once
_PIECE, _PIECES_ELEMENTS = 32, 1 << 22  # tokens of a piece of a long sum, and numbers that all pieces may give


def operand(matrix: Tensor, *others: Tensor) -> Tensor:
    """Return a matrix in the dtype of products with it: its own where kernels run, else the compute dtype of all."""
    if use_kernels(matrix, *others):
        return matrix
    return matrix.to(compute_dtype(matrix.dtype, *(other.dtype for other in others)))


def pre_acts(centred: Activations, W_enc_T: Weights, b_enc: LatentBias, precision: str) -> LatentActs:
    """Return centred @ W_enc_T.T + b_enc: [B, d_sae], compute dtype; with kernels, in that precision of the product."""
    dtype = compute_dtype(centred.dtype, W_enc_T.dtype)
    if not use_kernels(centred, W_enc_T):
        return F.linear(centred.to(dtype), W_enc_T.to(dtype), b_enc.to(dtype))
    from flashsae.ops.encode.product import products_in

    narrow = torch.bfloat16 if is_rounded(precision) else dtype
    x, weights = centred.to(narrow), W_enc_T.to(narrow)
    with products_in(precision), part("dense products"):
        if narrow == dtype:
            return (x @ weights.T).add_(b_enc.to(dtype))
        result = torch.empty(len(x), len(weights), dtype=dtype, device=x.device)
        for tokens in _parts(len(x), len(weights)):
            result[tokens] = x[tokens] @ weights.T
    return result.add_(b_enc.to(dtype))


def decode(acts: CodeActs, pattern: Pattern, W_dec: Weights, b_dec: InputBias | None) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], compute dtype. Code and product are rounded to that of W_dec."""
    x_hat = product(acts, pattern, W_dec)
    dtype = compute_dtype(W_dec.dtype)
    return x_hat.to(dtype) if b_dec is None else x_hat.to(dtype) + b_dec.to(dtype)


def product(acts: CodeActs, pattern: Pattern, W_dec: Weights) -> Activations:
    """Multiply the dense code by W_dec: -> [B, d_in], dtype of W_dec."""
    x_hat = W_dec.new_empty(pattern.B, W_dec.shape[1])
    with part("dense products"):
        for tokens in _parts_of(acts, pattern, W_dec):
            torch.mm(_code_of(acts, pattern, tokens, W_dec), W_dec, out=x_hat[tokens])
    return x_hat


def decode_grad_acts(grad_x_hat: Activations, pattern: Pattern, W_dec: Weights) -> CodeActs:
    """Multiply gradients by every row of W_dec and keep those of the code, as `acts`, compute dtype."""
    dtype = compute_dtype(W_dec.dtype)
    if pattern.is_full and W_dec.dtype == dtype:
        return grad_x_hat.to(dtype) @ W_dec.T
    empty = torch.empty if pattern.starts is None else torch.zeros  # not every place is used
    grad_acts = empty(pattern.latents.shape, dtype=dtype, device=W_dec.device)
    with part("dense products"):
        for tokens in _parts(pattern.B, pattern.d_sae):
            products = F.linear(grad_x_hat[tokens].to(W_dec.dtype), W_dec)
            if pattern.is_full:
                grad_acts[tokens] = products
            elif pattern.starts is None:
                grad_acts[tokens] = products.gather(1, pattern.latents[tokens].long())
            else:
                places, inside = _places(pattern, tokens)
                found = products.flatten()[torch.where(inside, places, 0)].to(dtype)
                grad_acts = torch.where(inside, found, grad_acts)
    return grad_acts


def latent_rows(
    pattern: Pattern, coeffs: CodeActs, rows: Activations, with_sums: bool = False
) -> tuple[Weights, LatentBias | None]:
    """Multiply the transposed dense code by rows: -> [d_sae, d], dtype of rows; sum it: -> [d_sae], compute dtype.

    The code is rounded to the dtype of rows, except for the sums of a full one; sums over parts of the tokens are added
    in the compute dtype.
    """
    if pattern.is_full and with_sums:
        total, _ = latent_rows(pattern, coeffs, rows)
        return total, coeffs.sum(0, dtype=compute_dtype(coeffs.dtype))
    dtype, d_sae = compute_dtype(rows.dtype), pattern.d_sae
    like = rows.new_empty(d_sae, 0)
    parts = _parts_of(coeffs, pattern, like)
    with part("dense products"):
        if len(parts) == 1:
            whole = _code_of(coeffs, pattern, parts[0], like)
            return _transposed_product(whole, rows), whole.sum(0, dtype=dtype) if with_sums else None
        total = torch.zeros(d_sae, rows.shape[1], dtype=dtype, device=rows.device)
        sums = torch.zeros(d_sae, dtype=dtype, device=rows.device)
        for tokens in parts:
            piece = _code_of(coeffs, pattern, tokens, like)
            total += piece.T @ rows[tokens]
            if with_sums:
                sums += piece.sum(0, dtype=dtype)
        return total.to(rows.dtype), sums if with_sums else None


def _transposed_product(whole: LatentActs, rows: Activations) -> Weights:
    """Return whole.T @ rows; a small product of float32 on a GPU with sums over tokens in pieces.

    A library sums few columns in one row of additions each, and then rounds more than it does for many columns, as a
    weight gradient of all latents has them.
    """
    (B, columns), d = whole.shape, rows.shape[1]
    pieces = -(-B // _PIECE)
    if pieces < 2 or pieces * columns * d > _PIECES_ELEMENTS or rows.dtype != torch.float32 or not use_kernels(rows):
        return whole.T @ rows
    left, right = (F.pad(matrix, (0, 0, 0, pieces * _PIECE - B)) for matrix in (whole, rows))
    return (left.view(pieces, _PIECE, columns).mT @ right.view(pieces, _PIECE, d)).sum(0)


def _parts_of(acts: CodeActs, pattern: Pattern, weights: Tensor) -> list[slice]:
    """Return the tokens whose dense code is in memory at once, part by part; all where it is there already."""
    is_there = pattern.is_full and acts.dtype == weights.dtype
    return [slice(0, pattern.B)] if is_there else _parts(pattern.B, pattern.d_sae)


def _parts(B: int, d_sae: int) -> list[slice]:
    step = max(1, _CODE_ELEMENTS // d_sae)
    return [slice(start, min(start + step, B)) for start in range(0, B, step)]


def _code_of(acts: CodeActs, pattern: Pattern, tokens: slice, weights: Tensor) -> LatentActs:
    """Return the dense code of some tokens in the dtype of [d_sae, ...] weights."""
    if pattern.is_full:
        return acts[tokens].to(weights.dtype)
    if pattern.starts is None:
        return code(acts[tokens], pattern.latents[tokens], weights)
    places, _ = _places(pattern, tokens)
    size = (tokens.stop - tokens.start) * pattern.d_sae
    dense = torch.zeros(size + 1, dtype=weights.dtype, device=weights.device)
    # a token has a latent once, so only what is written behind the end is written twice
    return dense.scatter_(0, places, acts.to(weights.dtype))[:-1].view(-1, pattern.d_sae)


def _places(pattern: Pattern, tokens: slice) -> tuple[Tensor, Tensor]:
    """Return where entries stand in the dense code of some tokens, and which do: the others stand behind its end."""
    owner, latents = pattern.tokens.long(), pattern.latents
    inside = (owner >= tokens.start) & (owner < tokens.stop) & (latents < pattern.d_sae)
    size = (tokens.stop - tokens.start) * pattern.d_sae
    return torch.where(inside, (owner - tokens.start) * pattern.d_sae + latents, size), inside


def code(top_acts: TopActs, top_indices: TopIndices, weights: Tensor) -> LatentActs:
    """Return the dense code in the dtype of [d_sae, ...] weights; repeats are summed."""
    if use_kernels(weights):
        from flashsae.ops.dense.launch import LARGEST_K, launch_dense_code

        if top_indices.shape[1] <= LARGEST_K:
            return launch_dense_code(top_acts, top_indices, len(weights), weights.dtype)
    zeros = weights.new_zeros(len(top_acts), len(weights))
    return zeros.scatter_add_(1, top_indices.long(), top_acts.to(weights.dtype))

"""Numbers for the entries of a pattern that is there already: their pre-activations, and what each latent has."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.encode.op import check_encoder, resolve
from flashsae.ops.gradients import share
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import Precision, check_device, check_float, check_ordinary, check_shape, compute_dtype
from flashsae.precision import operand_of


def pre_acts(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    pattern: Pattern,
    *,
    b_dec: Tensor | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Compute the pre-activations of given latents alone.

        pre_acts[e] = (x[token of e] - b_dec) · W_enc_T[latent of e] + b_enc[latent of e]

    Args:
        x, W_enc_T, b_enc, b_dec: as in `encode_topk`.
        pattern: which latents of which token.
        precision: as in `encode_topk`, without a screen; the product is accumulated in float32, never rounded to less.
    Returns:
        [B, k] or [capacity], as the latents of the pattern: float32 (float64 for float64); 0 in places not used.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
    Numerics: deterministic; accumulated in float32 (float64 for float64).
    Gradients: x, W_enc_T (as a factor, where `collect_factors` asked for it), b_enc and b_dec. Once differentiable.
    Cost: nnz·d_in multiply-adds forward, and for each of x and W_enc_T backward. `encode_topk` gives the values of the
        selection that it makes without this.
    Source: ours, docs/methodology.md#sparse-backward.
    """
    d_sae = check_encoder(x, W_enc_T, b_enc, b_dec, None)
    _check_pattern(pattern, d_sae, x.shape[0])
    check_device("pattern", pattern.latents, x, "x")
    chosen = operand_of(resolve(precision, W_enc_T))
    values: Tensor
    values, *_ = torch.ops.flashsae.pre_acts(x, W_enc_T, b_enc, b_dec, pattern.tensors, chosen)
    share(pattern, values)
    return values


def per_latent(values: Tensor, pattern: Pattern) -> Tensor:
    """Look up a number of each latent for every entry of a code, such as its threshold.

    Args:
        values: [d_sae], float.
        pattern: which latents of which token.
    Returns:
        values[latents], of the shape of the latents, dtype of values; 0 in places that are not used. Of a full pattern
        without a copy, so not to be written to.
    Raises:
        ShapeError, DtypeError: they do not fit each other.
    Numerics: deterministic, backward too, where sums are accumulated in float32 (float64 for float64).
    Gradients: values: the sum over the entries of each latent. Once differentiable.
    Source: ours, docs/methodology.md#sparse-backward.
    """
    check_ordinary("values", values)
    _check_pattern(pattern, None, None)
    check_shape("values", values, (pattern.d_sae,))
    check_float("values", values)
    check_device("values", values, pattern.latents, "the pattern")
    if pattern.is_full:
        return values.expand(pattern.B, -1)
    found: Tensor = torch.ops.flashsae.per_latent(values, pattern.tensors)
    share(pattern, found)
    return found


def latent_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """Sum a number of every entry of a code over the entries of each latent: the transpose of `per_latent`.

        sums[i] = Σ over entries e of latent i of values[e]

    With `code.acts` it is the mass of each latent in a batch, with `(code.acts > 0).float()` how often it is active.

    Args:
        values: [B, k] or [capacity], as the latents of the pattern, float. What stands in places that are not used is
            not read.
        pattern: which latents of which token.
    Returns:
        [d_sae], float32 (float64 for float64); 0 for a latent that no token uses.
    Raises:
        ShapeError, DtypeError: they do not fit each other.
    Numerics: deterministic; accumulated in float32 (float64 for float64), a latent with more than 128 entries in pieces
        of at most 128, the pieces in order.
    Gradients: values: that of its latent, 0 in places that are not used. Once differentiable.
    Cost: reads the index of the pattern and each value once.
    Source: ours, docs/methodology.md#sparse-backward.
    """
    check_ordinary("values", values)
    _check_pattern(pattern, None, None)
    check_shape("values", values, tuple(pattern.latents.shape))
    check_float("values", values)
    check_device("values", values, pattern.latents, "the pattern")
    if pattern.is_full:
        return values.sum(0, dtype=compute_dtype(values.dtype))
    sums: Tensor = torch.ops.flashsae.latent_sums(pattern.index.lists, values)
    return sums


def _check_pattern(pattern: Pattern, d_sae: int | None, B: int | None) -> None:
    if not isinstance(pattern, Pattern):
        raise DtypeError(f"pattern: expected a Pattern, such as code.pattern, got {type(pattern).__name__}.")
    if d_sae not in (None, pattern.d_sae) or B not in (None, pattern.B):
        raise ShapeError(f"pattern: expected {B} tokens and {d_sae} latents, got {pattern.B} and {pattern.d_sae}.")
    pattern.check()

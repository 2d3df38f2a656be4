"""Encode and select: from activations to the k active latents of each token, dense pre-activations never whole."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops.code import SparseCode
from flashsae.ops.encode import (
    operators,  # noqa: F401 - makes torch.ops.flashsae.encode_topk
    reference,
)
from flashsae.ops.encode.keys import is_scale
from flashsae.ops.gradients import share
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import (
    Precision,
    as_int,
    check_constant,
    check_device,
    check_float,
    check_k,
    check_noise,
    check_ordinary,
    check_precision,
    check_shape,
    has_values,
)

LEAST_WORKSPACE_BYTES, LEAST_WEIGHT_BYTES = 64 << 20, 32 << 20
"""Of inference, however few tokens there are: then launches would cost more than what they do."""


def encode_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    key_scale: Tensor | None = None,
    magnitude: bool = False,
    precision: Precision | None = None,
    workspace_bytes: int = reference.WORKSPACE_BYTES,
    weight_bytes: int = 0,
    noise: Tensor | None = None,
) -> SparseCode:
    """Encode tokens and keep the k largest latents of each.

        pre_acts = (x - b_dec) @ W_enc_T.T + b_enc;   acts = the k largest of each row of pre_acts

    No nonlinearity is in it: `code.replace(code.acts.relu())` is the code of a TopK SAE.

    Args:
        x: [B, d_in], float.
        W_enc_T: [d_sae, d_in], dtype of x, or bfloat16. One row a latent.
        b_enc: [d_sae], dtype of x, or float32.
        k: latents to keep, 1 <= k <= d_sae; fast up to 1024 on a GPU, which sorts whole rows for more.
        b_dec: [d_in], dtype of x, or float32; subtracted from x first. None for no subtraction.
        key_scale: [d_sae], float, finite and >= 0: select by pre_acts * key_scale, as with the norms of decoder rows.
            The values returned are not scaled. None: 1 each. Others are refused on the CPU; on a GPU, where looking
            would make the host wait, such a latent is selected for every token with the value NaN.
        magnitude: select by |pre_acts| (times key_scale); the values returned keep their sign.
        precision: of the product, on a GPU. "float32": certified, the selection is that of float32 arithmetic at
            about the price of a float16 product; "tf32", "bf16": operands rounded to that, accumulated in float32.
            "bf16-int8", "float32-int8": the selection and the values are those of float32 dot products of operands
            rounded to bfloat16, or as they are, found by an 8-bit product that misses a latent with a chance below 1e-6
            in a million steps of 8192 tokens; small sizes, and k above d_sae / 64, run as "bf16" and "float32". None:
            "bf16" for bfloat16 weights, "float32" for the others. The CPU and float64 ignore it.
        workspace_bytes: bound on the pre-activations in memory at once; a single row may exceed it.
        weight_bytes: on a GPU, bound on the rounded weights in memory at once; some rows may exceed it. They are then
            rounded again for every workspace full of pre-activations. 0: all of them, rounded once.
        noise: scalar, int64: seed of the noise that an 8-bit product is rounded with. Give each step another one, which
            knows nothing of tokens and weights, such as its number. None is 0. Read by "bf16-int8" and "float32-int8".
    Returns:
        the code: acts [B, k], float32 (float64 for float64), pre-activations of any sign; latents [B, k], int64,
        ascending within a row.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
        GradientError: key_scale requires a gradient.
    Numerics: products accumulated in float32 (float64 for float64). Exact selection among those values; of equal
        values the lowest index wins. A NaN in a row of x gives NaN values in that row and valid indices. float16
        tensors are widened to float32. Two runs give the same bits. docs/numerics.md#certified-float32.
    Gradients: x, W_enc_T (as a factor, where `collect_factors` asked for it), b_enc and b_dec, through the selected
        latents. That of b_dec costs d_sae·d_in, not B·k·d_in. Once differentiable.
    Cost: 2·B·d_in·d_sae FLOPs forward; backward 2·B·k·d_in for each of x and W_enc_T. Memory beyond the result:
        workspace_bytes, an eighth of it for group maxima, and copies of x and W_enc_T where they are rounded, of
        W_enc_T no more than weight_bytes.
    Source: Makhzani and Frey 2013 (k-sparse autoencoders); Gao et al. 2024, eq. 4; by magnitude Zhu et al. 2025,
        arXiv 2510.00404; selection and backward ours, docs/methodology.md#exact-selection.
    """
    d_sae = check_encoder(x, W_enc_T, b_enc, b_dec, key_scale)
    check_noise(noise, x)
    k, memory = check_k(k, d_sae), as_memory(workspace_bytes, weight_bytes)
    chosen = resolve(precision, W_enc_T)
    acts, latents, *_ = torch.ops.flashsae.encode_topk(
        x, W_enc_T, b_enc, b_dec, key_scale, [k, int(magnitude), *memory], chosen, noise
    )
    return shared_code(Pattern(latents, d_sae, ascends=True), acts)


def shared_code(pattern: Pattern, acts: Tensor) -> SparseCode:
    """Return a code whose pattern the backward pass of its values uses."""
    share(pattern, acts)
    return SparseCode(pattern, acts, pre_acts=acts)


def check_encoder(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    key_scale: Tensor | None,
) -> int:
    """Raise unless the arguments fit each other; return d_sae."""
    check_shape("W_enc_T", W_enc_T, ("d_sae", "d_in"))
    check_ordinary("x", x)
    d_sae, d_in = W_enc_T.shape
    if x.dim() == 2 and d_in != x.shape[1] == d_sae:
        raise ShapeError(
            f"W_enc_T: expected [d_sae, d_in], one row a latent, with d_in {d_sae} as x has it, got "
            f"{list(W_enc_T.shape)}. Transpose it: W_enc_T.T.contiguous()."
        )
    check_shape("x", x, ("B", d_in))
    if not (d_sae and d_in):
        raise ShapeError(f"d_sae and d_in: expected at least 1, got {d_sae} and {d_in}.")
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
        if key_scale.device.type == "cpu" and has_values(key_scale) and not bool(is_scale(key_scale).all()):
            raise ConfigError("key_scale: expected finite numbers >= 0, got negative ones, NaN or infinity.")
    return d_sae


def as_memory(workspace_bytes: int, weight_bytes: int = 0) -> list[int]:
    """Return bounds of what exists at once, as operators take them."""
    workspace_bytes, weight_bytes = as_int("workspace_bytes", workspace_bytes), as_int("weight_bytes", weight_bytes)
    if not 0 < workspace_bytes < 2**63:
        raise ConfigError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}.")
    if not 0 <= weight_bytes < 2**63:
        raise ConfigError(f"weight_bytes: expected a number of bytes, or 0 for no bound, got {weight_bytes}.")
    return [workspace_bytes, weight_bytes]


def resolve(precision: Precision | None, W_enc_T: Tensor) -> Precision:
    """Return the precision of a product by these weights."""
    check_precision(precision)
    return precision or ("bf16" if W_enc_T.dtype == torch.bfloat16 else "float32")


def inference_memory(x: Tensor, W_enc_T: Tensor) -> dict[str, int]:
    """Return bounds of memory with which encoding takes about a sixteenth of what dense codes would, or a floor.

    Dense pre-activations and a dense code of B tokens are 2·B·d_sae numbers. All weights are rounded once where that
    and a whole workspace are no more than a sixteenth of it; otherwise a block at a time.

    Args:
        x: [B, d_in].
        W_enc_T: [d_sae, d_in].
    Returns:
        workspace_bytes and weight_bytes of `encode_topk` and `encode_above`; {}, the defaults, on the CPU, and where a
        compiler traces, whose graph is to be good for any number of tokens.
    """
    if W_enc_T.device.type == "cpu" or torch.compiler.is_compiling():
        return {}
    (d_sae, d_in), whole = W_enc_T.shape, reference.WORKSPACE_BYTES
    budget = len(x) * d_sae * W_enc_T.element_size() // 8
    if 2 * d_sae * d_in + whole * 9 // 8 <= budget:
        return {"workspace_bytes": whole}
    return {
        "workspace_bytes": max(LEAST_WORKSPACE_BYTES, budget * 3 // 4),
        "weight_bytes": max(LEAST_WEIGHT_BYTES, budget // 8),
    }

"""Encode and select: from activations to the k active latents of each token, dense pre-activations never whole."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.encode import reference
from flashsae.ops.encode.operators import is_scale
from flashsae.ops.index import LatentIndex
from flashsae.ops.validate import (
    Precision,
    as_int,
    check_constant,
    check_device,
    check_float,
    check_k,
    check_ordinary,
    check_precision,
    check_shape,
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
    if not isinstance(return_index, bool):
        raise ConfigError(f"return_index: expected True or False, got {return_index!r}.")
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
    check_ordinary("x", x)
    d_sae, d_in = W_enc_T.shape
    if x.dim() == 2 and d_in != x.shape[1] == d_sae:
        raise ShapeError(
            f"W_enc_T: expected [d_sae, d_in], one row a latent, with d_in {d_sae} as x has it, got "
            f"{list(W_enc_T.shape)}. Transpose it: W_enc_T.T.contiguous()."
        )
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
        if key_scale.device.type == "cpu" and has_values(key_scale) and not bool(is_scale(key_scale).all()):
            raise ConfigError("key_scale: expected finite numbers >= 0, got negative ones, NaN or infinity.")
    workspace_bytes = as_int("workspace_bytes", workspace_bytes)
    if not 0 < workspace_bytes < 2**63:
        raise ConfigError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}.")
    return d_sae, workspace_bytes


def _resolve(precision: Precision | None, W_enc_T: Tensor) -> Precision:
    check_precision(precision)
    return precision or ("bf16" if W_enc_T.dtype == torch.bfloat16 else "float32")

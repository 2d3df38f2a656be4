"""The product that is screened: how it accumulates, and its operands in float16 with what bounds their error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.ops.encode import certify_kernels

LARGEST_ROWS = 65535 * 16
"""Rows at once, at most: a grid has no more than 65535 programs in its second dimension, each with 16 rows."""


@dataclass(frozen=True)
class Rounded:
    """Operands in float16 and what bounds their error (encode_topk_round_kernel).

    Args:
        x: [B, d_in], float16.
        W: [d_sae, d_in], float16.
        tokens: [3, B], float32.
        latents: [3, d_sae], float32.
    """

    x: Tensor
    W: Tensor
    tokens: Tensor
    latents: Tensor


def round_operands(x: Tensor, W_enc_T: Tensor) -> Rounded:
    """Round tokens and rows of weights to float16 and note what bounds the error."""
    d = x.shape[1]
    top_exponent = (15 - (d - 1).bit_length()) // 2  # then no product of two rows can overflow float16
    # a tensor core adds at least 8 products at a time and loses less than 2**-21 of the largest sum each time; the
    # float32 rescoring adds d / 128 products in a row in each of its lanes, then the lanes in pairs
    accumulation = d / 8 * 2.0**-21 + (d / 128 + 32) * 2.0**-23
    rounded, facts = [], []
    for matrix, is_token in ((x, True), (W_enc_T, False)):
        half = torch.empty_like(matrix, dtype=torch.float16)
        fact = torch.empty(3, len(matrix), dtype=torch.float32, device=matrix.device)
        block_d = triton.next_power_of_2(d)
        certify_kernels.encode_topk_round_kernel[(len(matrix),)](
            matrix, half, fact, len(matrix), d, matrix.stride(0), top_exponent, accumulation,
            IS_TOKEN=is_token, BLOCK_D=block_d, num_warps=max(1, min(16, block_d // 1024)),
        )  # fmt: skip
        rounded.append(half)
        facts.append(fact)
    return Rounded(*rounded, *facts)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Have cuBLAS accumulate in float32, and use TF32 if asked to, whatever the user's settings; then put them back."""
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = [
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ]
    before = {name: getattr(matmul, name) for name in names}
    tf32 = matmul.fp32_precision
    try:
        for name in names:
            setattr(matmul, name, False)
        if precision == "tf32":
            matmul.fp32_precision = "tf32"
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        if precision == "tf32":
            matmul.fp32_precision = tf32

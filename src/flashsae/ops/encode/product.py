"""The product that is screened: its parts, how it accumulates, its operands in float16 and what bounds their error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.ops.encode import certify_kernels
from flashsae.ops.validate import packed
from flashsae.precision import operand_of

LARGEST_ROWS = 65535 * 16
"""Rows at once, at most: a grid has no more than 65535 programs in its second dimension, each with 16 rows."""

LEAST_LATENTS = 32
"""Rows of weights that are rounded at once, at least."""

Memory = list[int]
"""Bytes of products at once, and of rounded weights at once, 0 for all of them: what operators are given."""


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of the operands of the product that is screened, and of the product."""
    return {"bf16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float16}[precision]


@dataclass(frozen=True)
class Screened:
    """What an 8-bit product says of keys beside their centres, which are rounded to nearest; infinity stands for NaN.

    A key differs from its centre by no more than 2^-8 of it, and t · (S · p + A · q). NaN there: it may be anything.

    Args:
        maxima: [tokens, groups of 32], int32: `_to_key` of the largest centre of each.
        of_tokens: [3, tokens], float32: t, p and q. p = q = 0 of a token of zeros.
        of_latents: [2, d_sae], float32: S and A.
        of_groups: [2, groups], float32: the largest S and A of each.
    """

    maxima: Tensor
    of_tokens: Tensor
    of_latents: Tensor
    of_groups: Tensor


@dataclass(frozen=True)
class Part:
    """Products of some tokens, whose memory is used again for the next.

    Args:
        tokens: which.
        products: [tokens, d_sae or more].
        bounds: what bounds the error, of tokens [3, tokens] and of latents [3, d_sae], float32, if certified.
        screened: what bounds the error, if products are centres of keys, bfloat16.
    """

    tokens: slice
    products: Tensor
    bounds: tuple[Tensor, Tensor] | None
    screened: Screened | None = None


@dataclass(frozen=True)
class Product:
    """x @ W_enc_T.T, some tokens at a time.

    Args:
        x: [B, d_in], packed; certified in float32, else of the dtype of the product.
        W: [d_sae, d_in], packed; certified in float32.
        precision: "bf16", "tf32" or "float32" (certified: operands are float16).
        rows: tokens at a time.
        latents: rows of weights that are rounded at a time: all of them once, or some of them again for every part.
        noise: scalar, int64: seed of what an 8-bit screen is rounded with; None is 0.
    """

    x: Tensor
    W: Tensor
    precision: str
    rows: int
    latents: int
    noise: Tensor | None = None

    @classmethod
    def of(
        cls, x: Tensor, W_enc_T: Tensor, precision: str, memory: Memory, most_rows: int = LARGEST_ROWS,
        noise: Tensor | None = None,
    ) -> Product:  # fmt: skip
        """Return the product of operands as they come, in parts that keep to a bound of memory.

        Args:
            x: [B, d_in], already centred.
            W_enc_T: [d_sae, d_in].
            precision: of the product.
            memory: the bound.
            most_rows: tokens at a time, at most.
            noise: as of the product.
        """
        precision = operand_of(precision)
        dtype, certified, (n, d) = dtype_of(precision), precision == "float32", W_enc_T.shape
        x = packed(x.to(torch.float32 if certified else dtype))
        W = packed(W_enc_T.to(torch.float32) if certified else W_enc_T)
        fit = memory[0] // (_stride(n) * dtype.itemsize)
        at_once = memory[1] // (d * dtype.itemsize) // LEAST_LATENTS * LEAST_LATENTS
        latents = min(n, max(LEAST_LATENTS, at_once)) if memory[1] and W.dtype != dtype else n
        return cls(x, W, precision, max(1, min(len(x), LARGEST_ROWS, most_rows, fit)), latents, noise)

    @property
    def certified(self) -> bool:
        """Whether products only screen."""
        return self.precision == "float32"

    def parts(self) -> Iterator[Part]:
        """Yield the products, part by part."""
        (B, n), dtype, device = (len(self.x), len(self.W)), dtype_of(self.precision), self.x.device
        raw = torch.empty(self.rows, _stride(n), dtype=dtype, device=device)
        of_latents = torch.empty(3, n, dtype=torch.float32, device=device) if self.certified else None
        blocks = [slice(first, min(first + self.latents, n)) for first in range(0, n, self.latents)]
        whole = self._rounded(blocks[0], of_latents) if len(blocks) == 1 else None
        for first in range(0, B, self.rows):
            tokens = slice(first, min(first + self.rows, B))
            products = raw[: tokens.stop - first]
            left, of_tokens = self._left(tokens)
            for block in blocks:
                right = self._rounded(block, of_latents) if whole is None else whole
                with products_in(self.precision):
                    torch.mm(left, right.T, out=products[:, block])
            del right
            if tokens.stop == B:
                whole = None  # rounded weights make room for what follows
            bounds = None if of_tokens is None or of_latents is None else (of_tokens, of_latents)
            yield Part(tokens, products, bounds)

    def _left(self, tokens: slice) -> tuple[Tensor, Tensor | None]:
        return _in_half(self.x[tokens], is_token=True) if self.certified else (self.x[tokens], None)

    def _rounded(self, block: slice, of_latents: Tensor | None) -> Tensor:
        """Return some rows of weights in the dtype of the product, and note what bounds their error."""
        if of_latents is None:
            return self.W[block].to(dtype_of(self.precision))
        half, facts = _in_half(self.W[block], is_token=False)
        of_latents[:, block] = facts
        return half


def _stride(n: int) -> int:
    return int(triton.cdiv(n, 8) * 8)  # rows of the product stay aligned


def _in_half(matrix: Tensor, *, is_token: bool) -> tuple[Tensor, Tensor]:
    """Return rows in float16, and what bounds the error, [3, rows], float32 (encode_topk_round_kernel)."""
    rows, d = matrix.shape
    top_exponent = (15 - (d - 1).bit_length()) // 2  # then no product of two rows can overflow float16
    # a tensor core adds at least 8 products at a time and loses less than 2**-21 of the largest sum each time; the
    # float32 rescoring takes a product through d / 64 + 13 roundings of 2**-24 at most (launch_dots), less than allowed
    accumulation = d / 8 * 2.0**-21 + (d / 128 + 32) * 2.0**-23
    half = torch.empty_like(matrix, dtype=torch.float16)
    facts = torch.empty(3, rows, dtype=torch.float32, device=matrix.device)
    block_d = triton.next_power_of_2(d)
    certify_kernels.encode_topk_round_kernel[(rows,)](
        matrix, half, facts, rows, d, matrix.stride(0), top_exponent, accumulation,
        IS_TOKEN=is_token, BLOCK_D=block_d, num_warps=max(1, min(16, block_d // 1024)),
    )  # fmt: skip
    return half, facts


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

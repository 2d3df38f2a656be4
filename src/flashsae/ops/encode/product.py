"""The product that is screened: its parts, how it accumulates, its operands rounded and what bounds their error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.backend import log_once
from flashsae.ops.encode import certify_kernels, screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.screen import Rounded, Screened
from flashsae.ops.validate import packed
from flashsae.precision import has_screen, is_rounded, operand_of

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
        screen: whether operands are rounded to int8, and what is certified are the products of x and W as they are.
        keys: of a screen whose centres are wanted in place of products.
        noise: scalar, int64: seed of what an 8-bit screen is rounded with; None is 0.
    """

    x: Tensor
    W: Tensor
    precision: str
    rows: int
    latents: int
    screen: bool = False
    keys: Keys | None = None
    noise: Tensor | None = None

    @classmethod
    def of(
        cls, x: Tensor, W_enc_T: Tensor, precision: str, memory: Memory, most_rows: int = LARGEST_ROWS,
        noise: Tensor | None = None, keys: Keys | None = None, k: int | None = None,
    ) -> Product:  # fmt: skip
        """Return the product of operands as they come, in parts that keep to a bound of memory.

        Args:
            x: [B, d_in], already centred.
            W_enc_T: [d_sae, d_in].
            precision: of the product.
            memory: the bound.
            most_rows: tokens at a time, at most.
            noise: as of the product.
            keys: packed, where the centres of a screen will do.
            k: latents of a token that are wanted, where the centres will do.
        """
        (n, d), rounds = W_enc_T.shape, is_rounded(precision)
        screened = has_screen(precision) and screen.pays(len(x), n, d, k, rounds=rounds, device=x.device)
        if has_screen(precision) and not screened:
            log_once(
                f"{precision}: products that a screen would not hasten, and of rows too wide for the device, are "
                f"computed in {operand_of(precision)}"
            )
        precision = operand_of(precision)
        dtype = torch.int8 if screened else dtype_of(precision)
        certified = screened or precision == "float32"
        whole = torch.float32 if certified and not rounds else dtype_of(precision)
        x = packed(x.to(whole))
        # what is certified is rescored from weights as they are: kernels read bfloat16 as well as float32
        as_they_are = not certified or (screened and W_enc_T.dtype == torch.bfloat16)
        W = packed(W_enc_T if as_they_are else W_enc_T.to(whole))
        fit = memory[0] // (_stride(n) * max(2, dtype.itemsize))
        at_once = memory[1] // (d * dtype.itemsize) // LEAST_LATENTS * LEAST_LATENTS
        latents = min(n, max(LEAST_LATENTS, at_once)) if memory[1] and W.dtype != dtype else n
        rows = max(1, min(len(x), LARGEST_ROWS, most_rows, fit))
        return cls(x, W, precision, rows, latents, screened, keys if screened else None, noise)

    @property
    def certified(self) -> bool:
        """Whether products only screen."""
        return self.screen or self.precision == "float32"

    def parts(self) -> Iterator[Part]:
        """Yield the products, part by part."""
        (B, n), device = (len(self.x), len(self.W)), self.x.device
        dtype = (torch.float16 if self.keys is None else torch.bfloat16) if self.screen else dtype_of(self.precision)
        raw = torch.empty(self.rows, _stride(n), dtype=dtype, device=device)
        of_latents = torch.empty(3, n, dtype=torch.float32, device=device) if self.certified else None
        blocks = [slice(first, min(first + self.latents, n)) for first in range(0, n, self.latents)]
        whole = self._rounded(blocks[0], of_latents) if len(blocks) == 1 else None
        maxima = None
        if self.keys is not None:
            maxima = torch.empty(self.rows, triton.cdiv(n, screen.GROUP), dtype=torch.int32, device=device)
        for first in range(0, B, self.rows):
            tokens = slice(first, min(first + self.rows, B))
            products = raw[: tokens.stop - first]
            left, of_tokens = self._left(tokens)
            for block in blocks:
                right = self._rounded(block, of_latents) if whole is None else whole
                self._multiply(left, right, products, maxima, block)
            del right
            if tokens.stop == B:
                whole = None  # rounded weights make room for what follows
            yield self._part(tokens, products, maxima, of_tokens, of_latents)

    def _multiply(
        self, left: Tensor | Rounded, right: Tensor | Rounded, products: Tensor, maxima: Tensor | None, block: slice
    ) -> None:
        """Write the products with some rows of weights."""
        out = products[:, block]
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            with products_in(self.precision):
                torch.mm(left, right.T, out=out)  # type: ignore[union-attr, arg-type]
        elif self.keys is None or maxima is None:
            screen.products(left, right, out)
        else:
            groups = slice(block.start // screen.GROUP, triton.cdiv(block.stop, screen.GROUP))
            scale = None if self.keys.scale is None else self.keys.scale[block]
            keys = Keys(self.keys.b_enc[block], scale, self.keys.magnitude)
            screen.centres(left, right, keys, out, maxima[: len(products), groups])

    def _part(
        self, tokens: slice, products: Tensor, maxima: Tensor | None, of_tokens: Tensor | None,
        of_latents: Tensor | None,
    ) -> Part:  # fmt: skip
        if of_tokens is None or of_latents is None:
            return Part(tokens, products, None)
        if self.keys is not None and maxima is not None:
            errors = screen.errors_of(of_latents, self.keys.scale)
            return Part(tokens, products, None, Screened(maxima[: len(products)], of_tokens[:3], *errors))
        return Part(tokens, products, (of_tokens[-3:], of_latents))

    def _left(self, tokens: slice) -> tuple[Tensor | Rounded, Tensor | None]:
        if self.screen:
            left = screen.rounded(self.x[tokens], self.noise, is_token=True, first=tokens.start)
            return left, left.facts
        return _in_half(self.x[tokens], is_token=True) if self.certified else (self.x[tokens], None)

    def _rounded(self, block: slice, of_latents: Tensor | None) -> Tensor | Rounded:
        """Return some rows of weights in the dtype of the product, and note what bounds their error."""
        if of_latents is None:
            return self.W[block].to(dtype_of(self.precision))
        if self.screen:
            rows = screen.rounded(self.W[block], self.noise, is_token=False, first=block.start)
            of_latents[:, block] = rows.facts
            return rows
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

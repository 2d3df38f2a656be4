"""What the selections over a batch share: products some rows at a time, and rescoring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.product import LARGEST_ROWS, Rounded, products_in, round_operands
from flashsae.ops.select import kernels
from flashsae.ops.validate import packed

PROGRAMS = 1024
"""Programs that share a list whose length only the device knows, at most."""


@dataclass(frozen=True)
class Operands:
    """What is multiplied, some rows at a time.

    Args:
        x: [B, d_in], centred; in the dtype of the product, certified in float32.
        W: [d_sae, d_in], the same.
        keys: what is selected by, packed.
        rounded: operands in float16 and what bounds their error, if certified.
        precision: "bf16", "tf32" or "float32" (certified).
        rows: how many at a time.
    """

    x: Tensor
    W: Tensor
    keys: Keys
    rounded: Rounded | None
    precision: str
    rows: int

    @classmethod
    def of(cls, x: Tensor, W: Tensor, keys: Keys, precision: str, workspace_bytes: int) -> Operands:
        """Return operands as kernels read them."""
        certified = precision == "float32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x, W = packed(x.to(dtype), W.to(dtype))
        itemsize = torch.float16.itemsize if certified else dtype.itemsize
        fit = workspace_bytes // (_stride(W) * itemsize)
        rows = max(1, min(len(x), LARGEST_ROWS, fit, (2**31 - 1) // _stride(W)))
        rounded = round_operands(x, W) if certified and len(x) else None
        return cls(x, W, keys.packed(), rounded, precision, rows)

    @property
    def b_enc(self) -> Tensor:
        """The bias of pre-activations: [d_sae]."""
        return self.keys.b_enc

    @property
    def by(self) -> tuple[Tensor, Tensor | None]:
        """Bias and scale, as kernels take them."""
        return self.keys.b_enc, self.keys.scale

    @property
    def certified(self) -> bool:
        """Whether products only screen."""
        return self.precision == "float32"

    @property
    def parts(self) -> int:
        """How many times some rows are multiplied."""
        return int(triton.cdiv(len(self.x), self.rows))

    def products(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield the first row of each part, its products [rows, d_sae or more], and facts of its tokens, if certified.

        The memory of products is used again for the next part.
        """
        left, right = (self.x, self.W) if self.rounded is None else (self.rounded.x, self.rounded.W)
        raw = torch.empty(self.rows, _stride(right), dtype=left.dtype, device=left.device)
        for first in range(0, len(left), self.rows):
            part = slice(first, min(first + self.rows, len(left)))
            products = raw[: part.stop - first]
            with products_in(self.precision):
                torch.mm(left[part], right.T, out=products[:, : len(right)])
            yield first, products, None if self.rounded is None else self.rounded.tokens[:, part].contiguous()

    @property
    def latents(self) -> Tensor | None:
        """Facts of the latents, if certified."""
        return None if self.rounded is None else self.rounded.latents


def _stride(W: Tensor) -> int:
    return int(triton.cdiv(len(W), 8) * 8)  # rows of the product stay aligned


def rescore(
    operands: Operands,
    entries: tuple[Tensor, Tensor | None, Tensor],
    values: Tensor,
    candidates: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compute listed pre-activations in float32.

    Args:
        entries: their latents, their tokens, and how many they are (a scalar on the device).
        values: receives them.
        candidates: keys of upper bounds, the bound they must reach, and where keys of values go. None: all are wanted.
    """
    latents, tokens, used = entries
    high, state, keys = candidates or (None, None, None)
    capacity, d = len(values), operands.x.shape[1]
    if capacity:
        kernels.select_rescore_kernel[(min(8 * PROGRAMS, triton.cdiv(capacity, 16)),)](
            operands.x, operands.W, *operands.by, latents, tokens, high, state, used, keys,
            values, capacity, d, operands.x.stride(0), operands.W.stride(0),
            BLOCK=16, BLOCK_D=min(128, triton.next_power_of_2(d)), MAGNITUDE=operands.keys.magnitude, num_warps=2,
        )  # fmt: skip

"""What the selections over a batch share: products some rows at a time, and rescoring."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.product import Memory, Part, Product
from flashsae.ops.select import list_kernels

PROGRAMS = 1024
"""Programs that share a list whose length only the device knows, at most."""


@dataclass(frozen=True)
class Operands:
    """What is multiplied, some rows at a time.

    Args:
        product: of tokens and weights.
        keys: what is selected by, packed.
    """

    product: Product
    keys: Keys

    @classmethod
    def of(
        cls, x: Tensor, W: Tensor, keys: Keys, precision: str, memory: Memory, noise: Tensor | None = None
    ) -> Operands:
        """Return operands as kernels read them."""
        stride = int(triton.cdiv(len(W), 8) * 8)
        return cls(Product.of(x, W, precision, memory, (2**31 - 1) // stride, noise), keys.packed())

    @property
    def x(self) -> Tensor:
        """[B, d_in], centred; in the dtype of the product, certified in float32."""
        return self.product.x

    @property
    def W(self) -> Tensor:
        """[d_sae, d_in], not yet rounded to the dtype of the product."""
        return self.product.W

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
        return self.product.certified

    @property
    def parts(self) -> int:
        """How many times some rows are multiplied."""
        return int(triton.cdiv(len(self.x), self.product.rows))


def bounds_of(part: Part) -> tuple[Tensor | None, Tensor | None]:
    """Return what bounds the error of latents and of tokens, as kernels take them."""
    tokens, latents = part.bounds or (None, None)
    return latents, tokens


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
        list_kernels.select_rescore_kernel[(min(8 * PROGRAMS, triton.cdiv(capacity, 16)),)](
            operands.x, operands.W, *operands.by, latents, tokens, high, state, used, keys,
            values, capacity, d, operands.x.stride(0), operands.W.stride(0),
            BLOCK=16, BLOCK_D=min(128, triton.next_power_of_2(d)), MAGNITUDE=operands.keys.magnitude, num_warps=2,
        )  # fmt: skip

"""The sparse code: which latents of which token (the pattern), and how much (the values)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.pattern import LatentIndex as LatentIndex
from flashsae.ops.pattern import Pattern as Pattern
from flashsae.ops.validate import check_device, check_float, check_ordinary, check_shape


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The code of some tokens: which latents, and how much.

    Args:
        pattern: which latents of which token.
        acts: a number for each of `pattern.latents`, of its shape: [B, k] or [capacity], float.
        batch_shape: leading dimensions of what was encoded, whose product is B; None for [B].
        pre_acts: the pre-activations that the values were made of, as a selection gave them; None where nobody knows.
    """

    pattern: Pattern
    acts: Tensor
    batch_shape: tuple[int, ...] | None = None
    pre_acts: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise DtypeError(f"pattern: expected a Pattern, got {type(self.pattern).__name__}.")
        check_shape("acts", self.acts, tuple(self.pattern.latents.shape))
        check_float("acts", self.acts)
        check_device("acts", self.acts, self.pattern.latents, "the pattern")
        if self.batch_shape is not None and math.prod(self.batch_shape) != self.pattern.B:
            raise ShapeError(f"batch_shape: expected a product of {self.pattern.B}, got {list(self.batch_shape)}.")

    @classmethod
    def topk(cls, top_acts: Tensor, top_indices: Tensor, d_sae: int) -> SparseCode:
        """Return the code of k latents for each token: `Pattern.topk` with values.

        Args:
            top_acts: [..., k], float.
            top_indices: [..., k], int32 | int64, each in [0, d_sae). Repeats within a row add up.
            d_sae: number of latents.
        Raises:
            ShapeError, DtypeError, ConfigError: they do not fit.
        """
        check_ordinary("top_acts", top_acts)
        check_ordinary("top_indices", top_indices)
        if top_indices.dim() == 0:
            raise ShapeError("top_indices: expected the shape [..., k], got [].")
        check_shape("top_acts", top_acts, tuple(top_indices.shape))
        *batch, k = top_indices.shape
        tokens = math.prod(batch)
        pattern = Pattern.topk(top_indices.reshape(tokens, k), d_sae)
        return cls(pattern, top_acts.reshape(tokens, k), None if len(batch) == 1 else tuple(batch))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.pattern.d_sae

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading dimensions of what was encoded."""
        return (self.pattern.B,) if self.batch_shape is None else self.batch_shape

    @property
    def top_acts(self) -> Tensor:
        """Values where every token has k latents: [..., k]. ConfigError where the number varies."""
        return self._per_token("top_acts", self.acts)

    @property
    def top_indices(self) -> Tensor:
        """Latents where every token has k: [..., k]. ConfigError where the number varies."""
        return self._per_token("top_indices", self.pattern.latents)

    def _per_token(self, name: str, flat: Tensor) -> Tensor:
        k = self.pattern.k
        if k is None:
            raise ConfigError(
                f"{name}: tokens of this code have different numbers of latents: read acts, pattern.latents and "
                "pattern.starts, or call to_dense()."
            )
        return flat if self.batch_shape is None else flat.view(*self.batch_shape, k)

    def replace(self, acts: Tensor) -> SparseCode:
        """Return the code with other values of the same latents, whose index it shares."""
        return SparseCode(self.pattern, acts, self.batch_shape, self.pre_acts)

    def to_dense(self) -> Tensor:
        """Return latent_acts, [..., d_sae]: many times the memory of the code. Differentiable by `acts`."""
        pattern, B, d_sae = self.pattern, self.pattern.B, self.d_sae
        if pattern.is_full:
            dense = self.acts
        elif pattern.starts is None:
            dense = self._added(self.acts.new_zeros(B, d_sae), 1, pattern.latents.long())
        else:
            places = torch.where(pattern.latents < d_sae, pattern.tokens.long() * d_sae + pattern.latents, B * d_sae)
            dense = self._added(self.acts.new_zeros(B * d_sae + 1), 0, places)[:-1]
        return dense.view(*self.shape, d_sae)

    def _added(self, zeros: Tensor, dim: int, places: Tensor) -> Tensor:
        """Return zeros with values added at places; in them, where nobody differentiates: a second copy is large."""
        add = zeros.scatter_add if self.acts.requires_grad else zeros.scatter_add_
        return add(dim, places, self.acts)


def check_code(code: SparseCode) -> None:
    """Raise DtypeError unless this is a code, ShapeError if its latents are out of range (on the CPU)."""
    if not isinstance(code, SparseCode):
        raise DtypeError(
            f"code: expected a SparseCode, as encode_topk returns it and SparseCode.topk makes it, got "
            f"{type(code).__name__}."
        )
    code.pattern.check()

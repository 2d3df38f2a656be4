"""Gradients of weight matrices as factors: small things whose products they are, instead of [d_sae, d_in] numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import GradientError
from flashsae.ops.latent_rows.op import sum_rows
from flashsae.ops.pattern import LatentIndex
from flashsae.ops.validate import check_shape, compute_dtype


@dataclass(frozen=True)
class SparseFactor:
    """The gradient Σ over entries of coeffs · rows, as `latent_rows` sums it.

    Args:
        index: of the code.
        coeffs: [B, k] or [capacity], as the code, float32 (float64 for float64).
        rows: [B, d], float; [B·L, d] of a loss of L levels, where the index has rows in place of tokens.
        levels: L.
    """

    index: LatentIndex
    coeffs: Tensor
    rows: Tensor
    levels: int = 1
    versions: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self.versions or _versions(self.coeffs, self.rows))

    @property
    def is_intact(self) -> bool:
        """Whether nobody has written to its tensors since: a backward pass that leaves them need not own them."""
        return self.versions == _versions(self.coeffs, self.rows)

    @property
    def nbytes(self) -> int:
        """Memory that this keeps alive, though it may be shared with others."""
        return sum(t.nbytes for t in (self.coeffs, self.rows, *self.index.lists))

    def scaled(self, scale: Tensor | float) -> SparseFactor:
        """Return a factor whose gradient is this one times a scalar."""
        coeffs = self.coeffs * scale
        return replace(self, coeffs=coeffs, versions=(*_versions(coeffs), *self.versions[1:]))

    def dense(self) -> Tensor:
        """Return the gradient: [d_sae, d], compute dtype."""
        return sum_rows(self.index, self.coeffs, self.rows, compute_dtype(self.rows.dtype))


@dataclass(frozen=True)
class RowFactor:
    """A gradient of some rows only.

    Args:
        rows: [C, d], float: the gradients.
        slots: [d_sae], int32: which of them each latent has; -1 for none. None: row i is that of latent i.
    """

    rows: Tensor
    slots: Tensor | None
    versions: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self.versions or _versions(self.rows))

    @property
    def is_intact(self) -> bool:
        """As in `SparseFactor`."""
        return self.versions == _versions(self.rows)

    @property
    def nbytes(self) -> int:
        """Memory that this keeps alive."""
        return self.rows.nbytes

    def scaled(self, scale: Tensor | float) -> RowFactor:
        """Return a factor whose gradient is this one times a scalar."""
        return RowFactor((self.rows * scale).to(self.rows.dtype), self.slots)

    def dense(self) -> Tensor:
        """Return the gradient: [d_sae, d], compute dtype."""
        rows = self.rows.to(compute_dtype(self.rows.dtype))
        if self.slots is None:
            return rows
        return torch.where((self.slots >= 0)[:, None], rows[self.slots.clamp_min(0)], 0.0)


Factor = SparseFactor | RowFactor


@dataclass(frozen=True)
class RowGradient:
    """The whole gradient of a weight matrix as the latent pass reads it: a sparse part and a part of given rows.

    Args:
        sparse: summed over its entries; None for nothing.
        dense: [C, d], float; None for nothing.
        slots: [d_sae], int32: row of `dense` for each latent, -1 for none; None: row i is that of latent i.
    """

    sparse: SparseFactor | None = None
    dense: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, factors: Sequence[Factor]) -> RowGradient:
        """Join factors, such as those of several backward passes.

        Several sparse factors become one over all their tokens, so that accumulating over small batches is the same
        sum as that of one large batch.
        """
        if not all(factor.is_intact for factor in factors):
            raise GradientError(
                "a gradient needs the tensors of its backward pass as they were, and one of them (x, activations, a "
                "residual or an upstream gradient) has been modified in place since: step first, or call "
                "flashsae.ops.materialize(parameters) before."
            )
        sparse = [factor for factor in factors if isinstance(factor, SparseFactor)]
        rows = [factor for factor in factors if isinstance(factor, RowFactor)]
        if rows and all(factor.slots is rows[0].slots for factor in rows):
            return cls(_joined(sparse), added([factor.rows for factor in rows]), rows[0].slots)
        return cls(_joined(sparse), added([factor.dense() for factor in rows]) if rows else None)

    @property
    def is_empty(self) -> bool:
        """Whether there is no gradient at all."""
        return self.sparse is None and self.dense is None

    def check(self, weights: Tensor) -> None:
        """Raise ShapeError unless this fits a [d_sae, d] weight matrix."""
        d_sae, d = weights.shape
        if self.sparse is not None:
            check_shape("gradient.sparse.rows", self.sparse.rows, ("B", d))
            index = self.sparse.index
            size = (len(index.entries),) if index.k is None else (len(self.sparse.rows), index.k)
            check_shape("gradient.sparse.coeffs", self.sparse.coeffs, size)
            check_shape("gradient.sparse.index.offsets", self.sparse.index.offsets, (d_sae + 1,))
        if self.slots is not None:
            check_shape("gradient.slots", self.slots, (d_sae,))
        if self.dense is not None:
            check_shape("gradient.dense", self.dense, (d_sae if self.slots is None else "C", d))

    def part(self, start: int, stop: int) -> RowGradient:
        """Return the gradient of the rows from start to stop alone, for the reference: kernels want whole codes."""
        sparse, dense, slots = self.sparse, self.dense, self.slots
        if sparse is not None:
            sparse = SparseFactor(sparse.index.part(start, stop), sparse.coeffs, sparse.rows)
        if slots is not None:
            return RowGradient(sparse, dense, slots[start:stop])
        return RowGradient(sparse, None if dense is None else dense[start:stop])

    def total(self, like: Tensor) -> Tensor:
        """Return the gradient as numbers, of the shape, dtype and device of a weight matrix; zeros for no part."""
        parts = [] if self.sparse is None else [self.sparse.dense()]
        if self.dense is not None:
            parts.append(RowFactor(self.dense, self.slots).dense())
        return added(parts).to(like.dtype) if parts else torch.zeros_like(like)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return how often each has been written to; tensors of inference mode do not count that."""
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def added(parts: list[Tensor]) -> Tensor:
    """Add tensors in the compute dtype; one alone stays as it is."""
    total = parts[0]
    for part in parts[1:]:
        total = total.to(compute_dtype(total.dtype)) + part.to(compute_dtype(part.dtype))
    return total


def _joined(factors: list[SparseFactor]) -> SparseFactor | None:
    """Return one factor over the tokens of all.

    Where all have a k, codes narrower than the widest are filled up with coefficients of 0; else tokens are listed.
    """
    if len(factors) < 2:
        return factors[0] if factors else None
    d_sae, ks = factors[0].index.d_sae, [factor.index.k for factor in factors]
    coeffs, latents, tokens = [], [], []
    first = 0  # token of this factor among all
    k = None if None in ks else max(k or 0 for k in ks)
    for factor in factors:
        index, own = factor.index, factor.coeffs
        if k is None:
            coeffs.append(own.reshape(-1))
            latents.append(index.by_entry)
            order = torch.empty_like(index.entries).scatter_(0, index.entries, index.entry_tokens.long())
            tokens.append(order + first)
            first += len(factor.rows)
        else:
            missing = k - own.shape[1]
            coeffs.append(F.pad(own, (0, missing)))
            latents.append(F.pad(index.by_entry.view(own.shape), (0, missing)).flatten())
    dtype = factors[0].rows.dtype
    for factor in factors[1:]:
        dtype = torch.promote_types(dtype, factor.rows.dtype)
    index = LatentIndex.of_entries(torch.cat(latents), d_sae, k=k, tokens=None if k is not None else torch.cat(tokens))
    return SparseFactor(index, torch.cat(coeffs), torch.cat([factor.rows.to(dtype) for factor in factors]))


def is_scale(value: object) -> bool:
    """Tell whether factors can be `scaled` by a value: a real number, or a tensor of one."""
    return isinstance(value, int | float) or (type(value) is Tensor and value.dim() == 0 and not value.is_complex())


def is_divisor(value: object) -> bool:
    """Tell whether factors can be `scaled` by the inverse of a value."""
    return is_scale(value) and not (isinstance(value, int | float) and value == 0)


def inverse(scale: float | Tensor) -> float | Tensor:
    """Return 1 / scale, of a tensor in float64."""
    return 1.0 / (scale.double() if isinstance(scale, Tensor) else scale)

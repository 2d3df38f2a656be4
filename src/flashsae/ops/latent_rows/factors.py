"""Gradients of weight matrices as factors: what backward leaves on a parameter instead of [d_sae, d_in] numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.backend import use_dense, use_kernels
from flashsae.ops.dense import op as dense
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows.op import sum_rows
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import check_shape, compute_dtype


@dataclass(frozen=True)
class SparseFactor:
    """The gradient Σ over entries of coeffs · rows, as `latent_rows` sums it.

    Args:
        index: of the code.
        coeffs: [B, k], float32 (float64 for float64).
        rows: [B, d], float.
    """

    index: LatentIndex
    coeffs: Tensor
    rows: Tensor

    def scaled(self, scale: Tensor) -> SparseFactor:
        """Return a factor whose gradient is this one times a scalar."""
        return SparseFactor(self.index, self.coeffs * scale, self.rows)

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

    def scaled(self, scale: Tensor) -> RowFactor:
        """Return a factor whose gradient is this one times a scalar."""
        return RowFactor((self.rows * scale).to(self.rows.dtype), self.slots)

    def dense(self) -> Tensor:
        """Return the gradient: [d_sae, d], compute dtype."""
        rows = self.rows.to(compute_dtype(self.rows.dtype))
        if self.slots is None:
            return rows
        return torch.where((self.slots >= 0)[:, None], rows[self.slots.clamp_min(0)], 0.0)


Factor = SparseFactor | RowFactor


def collect_factors(*parameters: Tensor) -> None:
    """Have backward passes leave factors on these weight matrices from now on, and no `.grad`.

    The operations of `flashsae.ops` append to `parameter.factors`; other operations still add to `.grad`.
    `flashsae.optim.FactoredAdam` calls this and consumes both.
    """
    for parameter in parameters:
        if factors_of(parameter) is None:
            parameter.factors = []  # type: ignore[attr-defined]


def factors_of(parameter: Tensor) -> list[Factor] | None:
    """Return the factors collected so far; None for a parameter that collects none."""
    return getattr(parameter, "factors", None)


@torch.no_grad()
def materialize(parameters: Iterable[Tensor]) -> None:
    """Turn factors into ordinary dense gradients: `parameter.grad`, for any other optimiser, hook or test.

    Args:
        parameters: of a module; those without factors are left alone. A gradient that is already there is added to.
    Cost: [d_sae, d_in] numbers for each weight matrix, which the factors were there to avoid.
    """
    for parameter in parameters:
        factors = factors_of(parameter)
        if not factors:
            continue
        parts = [factor.dense() for factor in factors]
        parameter.grad = _sum(parts if parameter.grad is None else [parameter.grad, *parts]).to(parameter.dtype)
        factors.clear()


def is_dense(rows: Tensor, k: int, d_sae: int) -> bool:
    """Tell whether gradients of rows by a code of k of d_sae latents are matrix products, which need no index."""
    return use_kernels(rows) and use_dense(k, d_sae, rows)


def weight_gradient(
    factors: list[Factor] | None, top_indices: Tensor, index: LatentIndex | None, coeffs: Tensor, rows: Tensor,
    like: Tensor, with_sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Leave the gradient of a weight matrix on its list, or compute it where there is no list.

    Args:
        factors: of the matrix, or None.
        top_indices: [B, k].
        index: of top_indices; None if `is_dense`.
        coeffs, rows: as in `SparseFactor`.
        like: [d_sae, d], the matrix.
        with_sums: whether the sums of coefficients are of use.
    Returns:
        the gradient, dtype of the matrix, or None where it is left on the list; and the sum of the coefficients of each
        latent, [d_sae], or None where it does not come for free.
    """
    sums: Tensor | None = None
    if index is None:
        grad, sums = dense.latent_rows(top_indices, coeffs, rows, len(like), with_sums)
        factor: Factor = RowFactor(grad, None)
    else:
        factor = SparseFactor(index, coeffs.detach(), rows)  # a graph behind it would stay alive until it is used
    if factors is not None:
        factors.append(factor)
        return None, sums
    if index is None:
        return grad.to(like.dtype), sums
    return sum_rows(index, coeffs, rows, like.dtype), None


def take_rows(weights: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    """Copy the rows of some latents: a small SAE within a large one.

    Args:
        weights: [d_sae, d], float.
        latents: [C], int64: of each row that is returned. Repeats may stand for latents that get no gradient.
        slots: [d_sae], int32: row of each latent, -1 for those that are not taken.
    Returns:
        [C, d], dtype of weights.
    Raises:
        ShapeError: weights or slots do not fit each other.
    Gradients: weights (as a factor, where `collect_factors` asked for it): that of row slots[i] is that of latent i.
    Cost: C·d elements read and written, backward too.
    Source: ours, docs/methodology.md#dead-latents.
    """
    check_shape("weights", weights, ("d_sae", "d"))
    check_shape("slots", slots, (weights.shape[0],))
    rows: Tensor = torch.ops.flashsae.take_rows(weights, latents, slots)
    return rows


def _take_rows_fake(weights: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    return weights.new_empty(latents.shape[0], weights.shape[1])


@operator(_take_rows_fake)
def _take_rows(weights: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    return weights.index_select(0, latents)


def _save_take(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    weights, _, slots = inputs
    ctx.save_for_backward(slots)
    ctx.factors = factors_of(weights)


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (slots,) = ctx.saved_tensors
    factor = RowFactor(grad, slots)
    if ctx.factors is None:
        return factor.dense().to(grad.dtype), None, None
    ctx.factors.append(factor)
    return None, None, None


differentiate("take_rows", _take_backward, _save_take)


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
    def of(cls, parameter: Tensor) -> RowGradient:
        """Gather what backward passes left on a parameter: factors of several, and `.grad`.

        Several sparse factors become one over all their tokens, so that accumulating over small batches is the same
        sum as that of one large batch.
        """
        sparse: list[SparseFactor] = []
        rows: list[RowFactor] = []
        whole: list[Tensor] = [] if parameter.grad is None else [parameter.grad]
        for factor in factors_of(parameter) or []:
            if isinstance(factor, RowFactor):
                rows.append(factor)
            else:
                sparse.append(factor)
        if rows and not whole and all(factor.slots is rows[0].slots for factor in rows):
            return cls(_joined(sparse), _sum([factor.rows for factor in rows]), rows[0].slots)
        whole += [factor.dense() for factor in rows]
        return cls(_joined(sparse), _sum(whole) if whole else None)

    @property
    def is_empty(self) -> bool:
        """Whether there is no gradient at all."""
        return self.sparse is None and self.dense is None

    def check(self, weights: Tensor) -> None:
        """Raise ShapeError unless this fits a [d_sae, d] weight matrix."""
        d_sae, d = weights.shape
        if self.sparse is not None:
            check_shape("gradient.sparse.rows", self.sparse.rows, ("B", d))
            check_shape("gradient.sparse.coeffs", self.sparse.coeffs, (len(self.sparse.rows), self.sparse.index.k))
            check_shape("gradient.sparse.index.offsets", self.sparse.index.offsets, (d_sae + 1,))
        if self.slots is not None:
            check_shape("gradient.slots", self.slots, (d_sae,))
        if self.dense is not None:
            check_shape("gradient.dense", self.dense, (d_sae if self.slots is None else "C", d))

    def total(self, like: Tensor) -> Tensor:
        """Return the gradient as numbers, of the shape, dtype and device of a weight matrix; zeros for no part."""
        parts = [] if self.sparse is None else [self.sparse.dense()]
        if self.dense is not None:
            parts.append(RowFactor(self.dense, self.slots).dense())
        return _sum(parts).to(like.dtype) if parts else torch.zeros_like(like)


def _sum(parts: list[Tensor]) -> Tensor:
    """Add tensors in the compute dtype; one alone stays as it is."""
    total = parts[0]
    for part in parts[1:]:
        total = total.to(compute_dtype(total.dtype)) + part.to(compute_dtype(part.dtype))
    return total


def _joined(factors: list[SparseFactor]) -> SparseFactor | None:
    """Return one factor over the tokens of all; codes narrower than the widest are filled up with coefficients of 0."""
    if len(factors) < 2:
        return factors[0] if factors else None
    k = max(factor.index.k for factor in factors)
    coeffs, indices = [], []
    for factor in factors:
        missing = k - factor.index.k
        coeffs.append(F.pad(factor.coeffs, (0, missing)))
        indices.append(F.pad(factor.index.top_indices, (0, missing)))
    dtype = factors[0].rows.dtype
    for factor in factors[1:]:
        dtype = torch.promote_types(dtype, factor.rows.dtype)
    index = build_index(torch.cat(indices), factors[0].index.d_sae)
    return SparseFactor(index, torch.cat(coeffs), torch.cat([factor.rows.to(dtype) for factor in factors]))

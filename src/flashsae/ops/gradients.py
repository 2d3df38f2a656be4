"""Which matrices get their gradients as factors, and what backward passes leave on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from flashsae.backend import log_once, use_dense, use_kernels
from flashsae.errors import GradientError
from flashsae.ops.dense import op as dense
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.factors import RowFactor, SparseFactor
from flashsae.ops.latent_rows.op import sum_rows
from flashsae.ops.pattern import Pattern
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import check_device, check_float, check_indices, check_shape


class Collection:
    """What `collect_factors` returns: the handle that ends it. Also a context manager."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []

    def add(self, *parameters: Tensor) -> None:
        """Collect on these matrices too."""
        for parameter in parameters:
            _COLLECTIONS[parameter] = 1 + _COLLECTIONS.get(parameter, 0)  # type: ignore[no-untyped-call]
            self._parameters.append(parameter)

    def stop(self) -> None:
        """End it: backward passes leave ordinary gradients again, unless another collection goes on."""
        while self._parameters:
            parameter = self._parameters.pop()
            _COLLECTIONS[parameter] -= 1
            if not _COLLECTIONS[parameter]:
                del _COLLECTIONS[parameter]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


_COLLECTIONS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""How many collections there are on a matrix. Beside it and not on it, so that no copy of a matrix inherits them."""


def collect_factors(*parameters: Tensor) -> Collection:
    """Have backward passes leave `FactoredGradient`s on these weight matrices, from now on.

    Which `.grad` is then a tensor like any other, but costs no [d_sae, d_in] numbers until somebody reads them.
    `flashsae.optim.FactoredAdam` calls this for as long as it lives, and consumes the factors.

    Args:
        parameters: [d_sae, d], leaves of autograd. Copies, pickles and views of them collect nothing.
    Returns:
        a handle, whose `stop` ends it.
    Raises:
        DtypeError, ShapeError, GradientError: one of them is no tensor, no matrix, or no leaf that wants a gradient.
    """
    for parameter in parameters:
        check_shape("parameters", parameter, ("d_sae", "d"))
        is_wanted = parameter.requires_grad or isinstance(parameter, torch.nn.Parameter)  # a frozen one is no mistake
        if not (parameter.is_leaf and is_wanted):
            raise GradientError("parameters: expected leaves that require a gradient, such as module.W_dec itself.")
    collection = Collection()
    collection.add(*parameters)
    return collection


def collects(weights: Tensor) -> bool:
    """Tell whether gradients of a matrix are to be factors."""
    if weights in _COLLECTIONS:
        return True
    if len(_COLLECTIONS) and type(weights) not in (Tensor, torch.nn.Parameter):
        log_once(
            "operations that torch.compile traces leave ordinary gradients of [d_sae, d_in] numbers and no factors: "
            "call flashsae outside of what is compiled to keep the backward pass sparse",
            logging.WARNING,
        )
    return False


@torch.no_grad()
def materialize(parameters: Tensor | Iterable[Tensor]) -> None:
    """Turn factored gradients into ordinary ones, for an optimiser or extension that asks for memory, not for a tensor.

    Args:
        parameters: one, or those of a module; those without a factored gradient are left alone.
    Cost: [d_sae, d_in] numbers for each weight matrix, which the factors were there to avoid.
    """
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if isinstance(parameter.grad, FactoredGradient):
            parameter.grad = parameter.grad._own()


def is_dense(rows: Tensor, pattern: Pattern) -> bool:
    """Tell whether gradients of rows by a code are matrix products, which need no index."""
    return pattern.is_full or (use_kernels(rows) and use_dense(pattern.width, pattern.d_sae, rows))


def weight_gradient(
    as_factor: bool, pattern: Pattern, coeffs: Tensor, rows: Tensor, like: Tensor, with_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of a weight matrix.

    Args:
        as_factor: from `collects`.
        pattern: whose index is built now, if it was not and is needed.
        coeffs, rows: as in `SparseFactor`.
        like: [d_sae, d], the matrix.
        with_sums: whether the sums of coefficients are of use.
    Returns:
        the gradient, dtype of the matrix; and the sum of the coefficients of each latent, [d_sae], or None where it
        does not come for free.
    """
    if is_dense(rows, pattern):
        grad, sums = dense.latent_rows(pattern, coeffs, dense.operand(rows, coeffs), with_sums)
        return FactoredGradient([RowFactor(grad, None)], like) if as_factor else grad.to(like.dtype), sums
    if as_factor:
        # a graph behind them would stay alive until they are used
        return FactoredGradient([SparseFactor(pattern.index, coeffs.detach(), rows.detach())], like), None
    return sum_rows(pattern.index, coeffs, rows, like.dtype), None


def share(pattern: Pattern, output: Tensor) -> None:
    """Let the backward pass that made `output` use this pattern, so that all passes of a step share one index.

    Operators take and return tensors alone: each backward pass would else build its own.
    """
    if torch.compiler.is_compiling():
        return
    node: Any = output.grad_fn
    if hasattr(node, "origins"):  # a backward pass of ours
        node.pattern = pattern


def pattern_of(ctx: Any, tensors: Sequence[Tensor], d_sae: int, rows: Tensor) -> Pattern:
    """Return the pattern that was shared with a backward pass, or one of the tensors that it saved; rows: [B, ...]."""
    shared: Pattern | None = getattr(ctx, "pattern", None)
    return shared if shared is not None else Pattern.of_tensors(tensors, d_sae, rows)


def take_rows(weights: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    """Copy the rows of some latents: a small SAE within a large one.

    Args:
        weights: [d_sae, d], float.
        latents: [C], int32 | int64: of each row that is returned. Repeats may stand for latents that get no gradient.
        slots: [d_sae], int32 | int64: row of each latent, -1 for those that are not taken.
    Returns:
        [C, d], dtype of weights.
    Raises:
        ShapeError, DtypeError: weights, latents or slots do not fit each other, or indices are out of range.
    Gradients: weights (as a factor, where `collect_factors` asked for it): that of row slots[i] is that of latent i.
    Cost: C·d elements read and written, backward too.
    Source: ours, docs/methodology.md#dead-latents.
    """
    check_shape("weights", weights, ("d_sae", "d"))
    check_float("weights", weights)
    check_shape("slots", slots, (weights.shape[0],))
    check_shape("latents", latents, ("C",))
    for name, indices in (("latents", latents), ("slots", slots)):
        check_device(name, indices, weights, "weights")
    check_indices("latents", latents, weights.shape[0])
    check_indices("slots", slots, latents.shape[0], lowest=-1)
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
    ctx.like = weights.detach() if collects(weights) else None


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (slots,) = ctx.saved_tensors
    factor = RowFactor(grad, slots)
    if ctx.like is not None:
        return FactoredGradient([factor], ctx.like), None, None
    return factor.dense().to(grad.dtype), None, None


differentiate("take_rows", _take_backward, _save_take)

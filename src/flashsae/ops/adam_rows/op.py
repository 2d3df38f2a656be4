"""The latent pass: gradient, projection, Adam and norm of each weight row, in one reading and one writing."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.backend import use_kernels
from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.adam_rows import reference
from flashsae.ops.adam_rows.reference import AdamRule
from flashsae.ops.factors import RowGradient
from flashsae.ops.register import isolated
from flashsae.ops.validate import check_float, check_shape, compute_dtype

_CACHED_ELEMENTS = 1 << 18


@isolated
@torch.no_grad()
def adam_rows(
    weights: Tensor,
    moments: tuple[Tensor, Tensor],
    gradient: RowGradient,
    lr: Tensor,
    step: Tensor,
    bias_correction: Tensor,
    rule: AdamRule,
    *,
    low: Tensor | None = None,
) -> None:
    """Do one step of Adam on a weight matrix, in place, from the factors of its gradient.

        g = Σ coeffs · rows;  g −= (g·w) w;  m += (1 − β1)(g − m);  v = β2 v + (1 − β2) g²
        w −= lr / (1 − β1ᵗ) · m / (√(v / (1 − β2ᵗ)) + ε);  w /= ‖w‖

    The second and the last formula only with `rule.unit_norm`; weight decay in either place that `rule` says. Rows
    without gradient move by their momentum, as in dense Adam.

    Args:
        weights: [d_sae, d], float. With `low`: bfloat16, the high halves of float32 weights.
        moments: exp_avg and exp_avg_sq, [d_sae, d] each: float32 (float64 for float64), or bfloat16: approximate, then
            rounded stochastically, since steps of exp_avg_sq are smaller than half a unit of bfloat16.
        gradient: from `RowGradient.of`.
        lr: scalar tensor on the device of weights: learning rate.
        step: scalar tensor, float64, on the same device: t, counting from 1. Seeds the stochastic rounding.
        bias_correction: [2], float64, on the same device: 1 − β1ᵗ and 1 − β2ᵗ.
        rule: the other hyperparameters.
        low: [d_sae, d], int16: the low halves, from `split_halves`. Weights are then float32 numbers that lose nothing.
    Raises:
        ShapeError, DtypeError: names the argument, the expected and the actual shape or dtype.
    Numerics: deterministic; computed in float32 (float64 for float64).
    Gradients: none.
    Cost: 24 bytes a float32 weight, whole or in halves (16 with bfloat16 moments); B·k·d elements gathered, mostly
        from the cache. The gradient is never in memory. Rows over 16384 columns that are to be of unit norm take the
        reference.
    Source: Kingma and Ba 2015; the projection Bricken et al. 2023; the pass ours, docs/methodology.md#the-latent-pass.
    """
    _check(weights, low, gradient)
    dtypes = (torch.float64,) if weights.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments):
        check_shape(name, moment, tuple(weights.shape))
        _check_contiguous(name, moment)
        if moment.dtype not in dtypes:
            raise DtypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {moment.dtype}.")
    if not weights.numel():
        return
    if _fits_kernels(weights, rule.unit_norm):
        from flashsae.ops.adam_rows.launch import launch_adam_rows

        launch_adam_rows(weights, low, moments, gradient, (lr, step, bias_correction), rule)
        # kernels write behind autograd's back: a graph that needs the old weights must notice
        torch.autograd.graph.increment_version([weights, *moments])
        return
    for start, stop in _parts(weights):
        _step_part(start, stop, weights, low, moments, gradient, (lr, step, bias_correction), rule)


def _parts(weights: Tensor) -> list[tuple[int, int]]:
    """Return the rows, from and to, that the reference takes at once: as many as fit in the cache of a CPU core."""
    n, d = weights.shape
    rows = max(1, _CACHED_ELEMENTS // max(1, d) if weights.is_cpu and not use_kernels(weights) else n)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def _step_part(
    start: int, stop: int, weights: Tensor, low: Tensor | None, moments: tuple[Tensor, Tensor], gradient: RowGradient,
    scalars: tuple[Tensor, Tensor, Tensor], rule: AdamRule,
) -> None:  # fmt: skip
    """Do the step of the rows from start to stop."""
    dtype, (lr, step, bias_correction) = compute_dtype(weights.dtype), scalars
    weights, low = weights[start:stop], None if low is None else low[start:stop]
    before = weights.to(dtype) if low is None else reference.merge_halves(weights, low)
    narrow = [moment[start:stop] for moment in moments]
    wide = [moment.to(dtype) for moment in narrow]
    part = gradient if len(moments[0]) == stop - start else gradient.part(start, stop)
    after = reference.adam_rows(before, wide[0], wide[1], part.total(before), lr, bias_correction, rule)
    for number, (moment, value) in enumerate(zip(narrow, wide)):
        rounded = moment.dtype == torch.bfloat16
        moment.copy_(reference.round_stochastically(value, step, number, start) if rounded else value)
    if low is None:
        weights.copy_(after)
    else:
        for half, value in zip((weights, low), reference.split_halves(after)):
            half.copy_(value)


@isolated
@torch.no_grad()
def row_squares(weights: Tensor, gradient: RowGradient, unit_norm: bool, *, low: Tensor | None = None) -> Tensor:
    """Compute the squared norm of each row of the gradient that `adam_rows` would use: for clipping.

    Args:
        weights, gradient, low: as in `adam_rows`.
        unit_norm: project the gradient first.
    Returns:
        [d_sae], float32 (float64 for float64).
    Raises:
        ShapeError, DtypeError: as in `adam_rows`.
    Numerics: deterministic. On a GPU the projection is by the high halves of split weights, so that the part of the
        norm that it removes is known to 2⁻⁹.
    Gradients: none.
    Cost: B·k·d elements gathered; reads the weights, 2 bytes each if split, if `unit_norm`. Writes d_sae numbers.
    Source: ours, docs/methodology.md#clipping.
    """
    _check(weights, low, gradient)
    if use_kernels(weights) and weights.numel():
        from flashsae.ops.adam_rows.launch import launch_row_squares

        return launch_row_squares(weights, gradient, unit_norm)
    squares = weights.new_zeros(len(weights), dtype=compute_dtype(weights.dtype))
    if not weights.numel():
        return squares
    for start, stop in _parts(weights):
        rows = weights[start:stop]
        whole = rows.to(squares.dtype) if low is None else reference.merge_halves(rows, low[start:stop])
        squares[start:stop] = reference.row_squares(gradient.part(start, stop).total(whole), whole, unit_norm)
    return squares


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name}: expected a contiguous tensor, which is changed in place. Call .contiguous() first.")


def _check(weights: Tensor, low: Tensor | None, gradient: RowGradient) -> None:
    check_shape("weights", weights, ("d_sae", "d"))
    check_float("weights", weights)
    _check_contiguous("weights", weights)
    gradient.check(weights)
    if low is not None:
        check_shape("low", low, tuple(weights.shape))
        _check_contiguous("low", low)
        if (weights.dtype, low.dtype) != (torch.bfloat16, torch.int16):
            raise DtypeError(
                f"weights and low: expected halves, bfloat16 and int16, got {weights.dtype} and {low.dtype}."
            )


def _fits_kernels(weights: Tensor, unit_norm: bool) -> bool:
    if not use_kernels(weights):
        return False
    from flashsae.ops.adam_rows.launch import LARGEST_ROW

    return not unit_norm or weights.shape[1] <= LARGEST_ROW

"""A dense matrix beside a code, such as the skip of a transcoder: its product, and its gradient for the latent pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.ops.encode.op import resolve
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.factors import RowFactor
from flashsae.ops.gradients import collects
from flashsae.ops.register import differentiate, operator
from flashsae.ops.validate import Precision, check_float, check_shape, compute_dtype
from flashsae.precision import operand_of


def linear(x: Tensor, W: Tensor, *, precision: Precision | None = None) -> Tensor:
    """Multiply tokens by a matrix.

        y = x @ W.T

    Args:
        x: [B, d_in], float.
        W: [d_out, d_in], dtype of x, or bfloat16.
        precision: of the products, on a GPU, backward too: "float32", "tf32", or "bf16", whose operands are rounded to
            that; nothing is selected, so "bf16-int8" is "bf16" and "float32-int8" is "float32". None: "bf16" for
            bfloat16 weights, "float32" for the others. The CPU and float64 ignore it.
    Returns:
        y: [B, d_out], float32 (float64 for float64).
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
    Numerics: accumulated in float32 (float64 for float64), rounded to nothing less.
    Gradients: x and W (as a factor, where `collect_factors` asked for it, so that bfloat16 weights have a float32 one).
        Once differentiable.
    Cost: 2·B·d_in·d_out FLOPs forward, and for each gradient.
    """
    check_shape("W", W, ("d_out", "d_in"))
    check_shape("x", x, ("B", W.shape[1]))
    check_float("x", x)
    check_float("W", W, x, "x", or_dtype=torch.bfloat16)
    y: Tensor = torch.ops.flashsae.linear(x, W, operand_of(resolve(precision, W)))
    return y


def _linear_fake(x: Tensor, W: Tensor, precision: str) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[0], dtype=compute_dtype(x.dtype))


@operator(_linear_fake)
def _linear(x: Tensor, W: Tensor, precision: str) -> Tensor:
    return _product(x, W.T, precision, compute_dtype(x.dtype))


def _product(a: Tensor, b: Tensor, precision: str, dtype: torch.dtype) -> Tensor:
    """Return a @ b in a compute dtype."""
    if not a.is_cuda or dtype == torch.float64 or not a.numel():
        return a.to(dtype) @ b.to(dtype)
    from flashsae.ops.encode.product import products_in

    with products_in(precision):
        if precision == "bf16":
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W, ctx.precision = inputs
    ctx.save_for_backward(x, W)
    ctx.as_factor = collects(W)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, W = ctx.saved_tensors
    grad_x = grad_W = None
    if ctx.needs_input_grad[0]:
        grad_x = _product(grad, W, ctx.precision, grad.dtype).to(x.dtype)
    if ctx.needs_input_grad[1]:
        whole = _product(grad.T, x, ctx.precision, grad.dtype)
        grad_W = FactoredGradient([RowFactor(whole, None)], W) if ctx.as_factor else whole.to(W.dtype)
    return grad_x, grad_W, None


differentiate("linear", _backward, _save)

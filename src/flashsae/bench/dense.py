"""What a training step of another implementation is made of, and dense PyTorch as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.bench.problem import Problem
from flashsae.bench.timing import float32_products
from flashsae.optim import default_lr
from flashsae.testing import UnitNormAdam, dense_decode, dense_topk


def backward(loss: Tensor) -> None:
    """Do the backward pass."""
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class AutogradStep:
    """One implementation, ready to run: `backward(loss(x))`, then `update()`.

    Args:
        loss: from x, [B, d_in] float32, to the scalar that it trains on.
        update: all that follows backward: gradients adjusted, optimiser, decoder adjusted, gradients forgotten.
        state: its parameters and buffers.
        squared_error: from its loss and x to the sum of squared errors.
        backward: of the loss, times a scale where its recipe has one.
        products: how float32 products are computed around all of it: "tf32", "ieee", or None for as they are.
    """

    loss: Callable[[Tensor], Tensor]
    update: Callable[[], None]
    state: tuple[Tensor, ...]
    squared_error: Callable[[float, Tensor], float]
    backward: Callable[[Tensor], None] = backward
    products: str | None = None

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which all of it is to run."""
        return float32_products(self.products)

    def run(self, x: Tensor) -> Tensor:
        """Do a whole training step; return the loss before it."""
        loss = self.loss(x)
        self.backward(loss)
        self.update()
        return loss.detach()


def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Return the context in which products are rounded to 16 bits."""
    return torch.autocast(device.type, dtype)


def unit_norm_adam(weights: tuple[Tensor, ...], W_dec: Tensor) -> Callable[[], None]:
    """Return the update by fused `torch.optim.Adam` that keeps the rows of one of these weights at norm 1."""
    return UnitNormAdam(weights, W_dec, default_lr(len(W_dec)), fused=W_dec.is_cuda).step


def fast_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select as fast as PyTorch can: of equal values whichever comes."""
    top = values.topk(k, dim=-1, sorted=False)
    return top.values, top.indices


def dense_pytorch(problem: Problem, precision: str = "bf16", *, compiled: bool = False) -> AutogradStep:
    """Dense PyTorch with autograd: linear, topk, relu, scatter, matmul; fused Adam, projection, unit norm.

    Args:
        problem: whose weights it starts from.
        precision: "bf16" (autocast), "tf32" or "float32" (IEEE), by the settings of torch.backends, put back later.
        compiled: forward and backward through torch.compile.
    """
    weights = tuple(weight.clone().requires_grad_() for weight in problem.weights)
    W_enc_T, b_enc, W_dec, b_dec = weights
    params, k = dict(zip(problem.params, weights)), problem.shape.k  # the problem itself is to be let go

    def loss(x: Tensor) -> Tensor:
        with autocast(W_dec.device) if precision == "bf16" else contextlib.nullcontext():
            latent_acts = dense_topk(x, W_enc_T, b_enc, k, b_dec, topk=fast_topk)
            x_hat = dense_decode(latent_acts, params)
        return (x_hat - x).square().sum()

    if compiled:
        torch.compiler.reset()  # else a second size is compiled for any size, which is slower
        loss = torch.compile(loss, dynamic=False)
    return AutogradStep(
        loss,
        unit_norm_adam(weights, W_dec),
        weights,
        lambda value, x: value,
        products={"bf16": None, "tf32": "tf32", "float32": "ieee"}[precision],
    )


def dense_pytorch_compiled(problem: Problem) -> AutogradStep:
    """Dense PyTorch in bf16 autocast, forward and backward through torch.compile."""
    return dense_pytorch(problem, compiled=True)

"""What a training step of another implementation is made of, and dense PyTorch as one."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flashsae.architecture import architecture_of
from flashsae.bench.problem import Problem
from flashsae.bench.setups import SLOWER
from flashsae.bench.timing import float32_products
from flashsae.optim import default_lr
from flashsae.sae.losses import token_variance
from flashsae.testing import UnitNormAdam, oracle
from flashsae.testing.oracles import DenseStep, dense_budgets, dense_prefixes


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
        squared_error: from what `run` returns, and x, to the sum of squared errors.
        backward: of the loss, times a scale where its recipe has one.
        products: how float32 products are computed around all of it: "tf32", "ieee", or None for as they are.
        error: the part of the last loss that is the error of the reconstruction; None where there is no other part.
        lr: learning rate, where it is known to be one of Adam as ours is.
    """

    loss: Callable[[Tensor], Tensor]
    update: Callable[[], None]
    state: tuple[Tensor, ...]
    squared_error: Callable[[float, Tensor], float]
    backward: Callable[[Tensor], None] = backward
    products: str | None = None
    error: Callable[[], Tensor] | None = None
    lr: float | None = None

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which all of it is to run."""
        return float32_products(self.products)

    def run(self, x: Tensor) -> Tensor:
        """Do a whole training step; return the loss before it, or its part that is the error."""
        loss = self.loss(x)
        self.backward(loss)
        self.update()
        return (loss if self.error is None else self.error()).detach()


def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Return the context in which products are rounded to 16 bits."""
    return torch.autocast(device.type, dtype)


def state_of(module: nn.Module) -> tuple[Tensor, ...]:
    """Return the parameters and buffers of a module."""
    return (*module.parameters(), *module.buffers())


@torch.no_grad()
def load(*pairs: tuple[Tensor, Tensor]) -> None:
    """Copy weights: pairs of theirs and ours."""
    for theirs, ours in pairs:
        theirs.copy_(ours)


def sum_per_token(value: float, x: Tensor) -> float:
    """Return the sum of squared errors of which the mean over tokens is known."""
    return value * len(x)


def adam(
    weights: Sequence[Tensor], W_dec: Tensor, *, unit_norm: bool = True, lr: float | None = None
) -> Callable[[], None]:
    """Return the update by fused `torch.optim.Adam`, which keeps the rows of W_dec at norm 1 unless told otherwise.

    Its learning rate is that of a TopK SAE unless one is given.
    """
    lr, fused = default_lr(len(W_dec)) if lr is None else lr, W_dec.is_cuda
    if unit_norm:
        return UnitNormAdam(weights, W_dec, lr, fused=fused).step
    plain = torch.optim.Adam(weights, lr, fused=fused)

    def update() -> None:
        plain.step()
        plain.zero_grad()

    return update


def fast_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select as fast as PyTorch can: of equal values whichever comes."""
    top = values.topk(k, dim=-1, sorted=False)
    return top.values, top.indices


def prefixes_once(step: DenseStep) -> Tensor:
    """Return the loss of a Matryoshka SAE with fixed prefixes, every latent decoded once: what a level adds."""
    prefixes = [
        round(each * step.latent_acts.shape[1]) if each <= 1 else round(each) for each in step.settings.prefixes
    ]
    x_hat, losses = step.params["b_dec"], []
    for low, high in zip([0, *prefixes], prefixes):
        x_hat = x_hat + step.latent_acts[:, low:high] @ step.params["W_dec"][low:high]
        losses.append(step.fvu(x_hat))
    total = torch.stack(losses)
    return total.sum() if step.settings.level_loss == "sum" else total.mean()


def budgets_once(step: DenseStep) -> Tensor:
    """Return the loss of a Hierarchical TopK SAE from k rows of the decoder a token, added up one after another."""
    k, params = step.settings.k, step.params
    acts, places = step.latent_acts.topk(k, dim=-1)
    x_hats = (acts.unsqueeze(-1) * params["W_dec"][places]).cumsum(1) + params["b_dec"]
    errors = (step.target.unsqueeze(1) - x_hats).square().sum((0, 2)) / (len(step.x) * step.variance)
    budgets = step.settings.budgets or range(1, k + 1)
    return errors[[budget - 1 for budget in budgets]].mean()


ONCE: dict[Callable[[DenseStep], Tensor | None], Callable[[DenseStep], Tensor]] = {
    dense_prefixes: prefixes_once,
    dense_budgets: budgets_once,
}
"""Terms of oracles that decode each of several reconstructions on its own, as somebody writes them who wants speed."""


def dense_pytorch(
    problem: Problem, precision: str = "bf16", *, compiled: bool = False, lr: float | None = None
) -> AutogradStep:
    """Dense PyTorch with autograd, by the oracle of the architecture: linear, topk, relu, scatter, matmul; fused Adam.

    Args:
        problem: whose architecture it trains, and whose weights it starts from.
        precision: "bf16" (autocast), "tf32" or "float32" (IEEE), by the settings of torch.backends, put back later.
        compiled: forward and backward through torch.compile.
        lr: learning rate; None is that of a TopK SAE, or a thousandth of it where codes lie above a threshold, as ours.
    """
    architecture, sites = architecture_of(problem.arch), problem.sites  # the problem itself is to be let go
    rows = {row.name: row for row in architecture.parameters}
    params = {name: value.clone().requires_grad_(rows[name].trained) for name, value in problem.params.items()}
    W_dec, dense, settings = params["W_dec"], oracle(problem.arch_name), problem.settings
    terms_of = {term.name: term for term in architecture.terms}
    weights = {name: terms_of[name].weight_in(problem.arch) for name in dense.terms}
    dense = replace(dense, terms={n: ONCE.get(term, term) for n, term in dense.terms.items() if weights[n]})
    variance = token_variance(sites.written(problem.xs[0]))
    if lr is None:
        lr = default_lr(len(W_dec)) / (SLOWER if architecture.varies else 1)
    first: list[Tensor] = []  # of the terms of the last loss

    def terms(x: Tensor) -> list[Tensor]:
        with autocast(W_dec.device) if precision == "bf16" else contextlib.nullcontext():
            given = {"target": sites.written(x), "topk": fast_topk, **settings}
            found = dense.losses(sites.read(x), params, variance, **given)
        return [weights[name] * value for name, value in found.items()]

    if compiled:
        torch.compiler.reset()  # else a second size is compiled for any size, which is slower
        terms = torch.compile(terms, dynamic=False)

    def loss(x: Tensor) -> Tensor:
        found = terms(x)
        first[:] = [found[0].detach()]
        return functools.reduce(operator.add, found)

    return AutogradStep(
        loss,
        adam(
            [value for value in params.values() if value.requires_grad], W_dec, unit_norm=rows["W_dec"].unit_norm, lr=lr
        ),
        tuple(params.values()),
        lambda value, x: value * len(x) * variance,
        products={"bf16": None, "tf32": "tf32", "float32": "ieee"}[precision],
        error=lambda: first[0],
        lr=lr,
    )


def dense_pytorch_compiled(problem: Problem) -> AutogradStep:
    """Dense PyTorch in bf16 autocast, forward and backward through torch.compile."""
    return dense_pytorch(problem, compiled=True)

"""A product with a matrix whose gradient the latent pass takes: for a bfloat16 matrix too, one of float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsae import ops
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops import FactoredGradient, linear
from flashsae.optim import FactoredAdam
from flashsae.testing import assert_as_accurate, integer_inputs

SHAPES = [(0, 3, 4), (1, 1, 1), (37, 13, 5), (64, 40, 96)]


def _run(x: Tensor, W: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, q = x.detach().requires_grad_(), W.detach().requires_grad_()
    y = linear(p, q)
    return (y.detach(), *torch.autograd.grad(y, (p, q), grad.to(y.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_t0_equals_the_product(shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    B, d_in, d_out = shape
    x, W, grad = (
        integer_inputs(*s, generator=generator, dtype=torch.float64) for s in ((B, d_in), (d_out, d_in), (B, d_out))
    )
    y, grad_x, grad_W = _run(x.to(dtype), W.to(dtype), grad)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(y.double(), x @ W.T)
    assert (grad_x.dtype, grad_W.dtype) == (dtype, dtype)
    assert torch.equal(grad_x, (grad @ W).to(dtype))
    assert torch.equal(grad_W, (grad.T @ x).to(dtype))


def test_t1_as_accurate_as_autograd_and_t3_repeatable(generator: torch.Generator) -> None:
    x, W, grad = (torch.randn(*s, generator=generator) for s in ((130, 70), (50, 70), (130, 50)))
    ours, again = _run(x, W, grad), _run(x, W, grad)
    exact = (x.double() @ W.double().T, grad.double() @ W.double(), grad.double().T @ x.double())
    for mine, other, theirs, truth in zip(ours, again, (x @ W.T, grad @ W, grad.T @ x), exact):
        assert torch.equal(mine, other)
        assert_as_accurate(mine, theirs, truth)


@pytest.mark.parametrize("split", [False, True])
def test_the_optimiser_gets_a_gradient_in_float32(split: bool, generator: torch.Generator) -> None:
    x, grad = (torch.randn(20, d, generator=generator) for d in (6, 4))
    W = torch.nn.Parameter(torch.randn(4, 6, generator=generator))
    expected = torch.nn.Parameter(W.detach().clone())
    optimizer, plain = FactoredAdam([W], 1e-2, split_weights=split), torch.optim.Adam([expected], 1e-2)
    y = linear(x, W)
    y.backward(grad)
    assert isinstance(W.grad, FactoredGradient)
    (expected.bfloat16().float() if split else expected).backward(grad.T @ x)
    optimizer.step()
    plain.step()
    assert W.dtype == (torch.bfloat16 if split else torch.float32)
    torch.testing.assert_close(optimizer.float32_weights(W), expected.detach(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    x, W = torch.zeros(5, 3), torch.zeros(4, 3)
    with pytest.raises(ShapeError, match=r"x: expected the shape \[B, 3\]"):
        ops.linear(torch.zeros(5, 4), W)
    with pytest.raises(ShapeError, match=r"W: expected the shape \[d_out, d_in\]"):
        ops.linear(x, torch.zeros(3))
    with pytest.raises(DtypeError, match=r"W: expected torch\.float32, the dtype of x"):
        ops.linear(x, W.double())
    with pytest.raises(ConfigError, match="precision"):
        ops.linear(x, W, precision="fp8")  # type: ignore[arg-type]

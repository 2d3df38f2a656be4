from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsae.nn import fvu_weights
from flashsae.ops import decode_loss


def _loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return the FVU of a reconstruction: each token has a latent of its own."""
    latents = torch.arange(len(x))[:, None]
    return decode_loss(torch.ones(len(x), 1), latents, x_hat, None, x, weights=fvu_weights(x)).loss


def test_fvu_weights_make_a_squared_error_the_fvu(generator: torch.Generator) -> None:
    x, x_hat = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    expected = (x - x_hat).square().mean() / (x - x.mean(0)).square().mean()
    assert _loss(x, x_hat).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_fvu_does_not_depend_on_scale_or_offset(generator: torch.Generator) -> None:
    x, x_hat = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    assert _loss(8 * x + 4, 8 * x_hat + 4).item() == pytest.approx(_loss(x, x_hat).item(), rel=1e-4)


def test_a_constant_batch_gives_no_nan() -> None:
    x_hat = torch.ones(3, 2, requires_grad=True)
    loss = _loss(torch.ones(3, 2), x_hat)
    loss.backward()
    assert loss.item() == 0.0
    assert x_hat.grad is not None
    assert bool(torch.isfinite(x_hat.grad).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_equal_wide_and_without_gradient(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(40, 3, generator=generator).to(dtype).requires_grad_()
    weights = fvu_weights(x)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not weights.requires_grad
    assert weights.shape == (40,)
    expected = 1 / (x.double() - x.double().mean(0)).square().sum()
    torch.testing.assert_close(weights.double(), expected.expand(40).detach(), rtol=1e-6, atol=0.0)

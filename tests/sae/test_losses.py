from __future__ import annotations

import math

import pytest
import torch

from flashsae.errors import ConfigError
from flashsae.ops import SparseCode, decode_loss
from flashsae.sae import fvu_weights, token_variance


def test_weights_make_a_squared_error_a_fraction_of_the_variance(generator: torch.Generator) -> None:
    x, x_hat = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    weights = fvu_weights(x, token_variance(x))
    latents = torch.arange(len(x))[:, None]  # each token has one of its own
    code = SparseCode.topk(torch.ones(len(x), 1), latents, len(x_hat))
    loss = decode_loss(code, x_hat, None, x, token_weights=weights).loss
    expected = (x - x_hat).square().mean() / (x - x.mean(0)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("B", [0, 1, 40])
def test_weights_are_equal_and_wide_and_the_batch_does_not_matter(dtype: torch.dtype, B: int) -> None:
    weights = fvu_weights(torch.ones(B, 3, dtype=dtype), 4.0)  # tokens that do not vary
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights.tolist() == pytest.approx([1 / (4 * B)] * B if B else [])


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_a_variance_that_is_none_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="variance: expected a positive number"):
        fvu_weights(torch.ones(3, 2), variance)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_the_variance_of_a_token_loses_no_digits_beside_an_offset(offset: float, generator: torch.Generator) -> None:
    x = torch.randn(3000, 5, generator=generator, dtype=torch.float64) + offset
    shifted = x - offset  # exact enough: offset has 53 bits to spare
    expected = (shifted - shifted.mean(0)).square().sum(1).mean().item()
    assert token_variance(x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.full((8192, 3), 0.1), torch.ones(1, 3), torch.ones(0, 3)])
def test_equal_tokens_have_no_variance_whatever_rounding_says(x: torch.Tensor) -> None:
    assert token_variance(x) == 0.0

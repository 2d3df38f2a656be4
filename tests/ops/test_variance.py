from __future__ import annotations

import pytest
import torch

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.variance import total_variance
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty


@pytest.mark.parametrize(("B", "d"), [(0, 3), (1, 1), (1, 70), (64, 64), (65, 3), (300, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t1_as_accurate_as_torch(B: int, d: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    x = torch.randn(B, d, generator=generator).to(dtype)
    with poison_empty():
        ours = total_variance(x.to(device)).cpu()
    exact = (x.double() - x.double().mean(0)).square().sum() if B else torch.zeros(()).double()
    theirs = (x.float() - x.float().mean(0)).square().sum() if B else torch.zeros(())
    assert_as_accurate(ours, theirs, exact)


def test_t0_integers_around_an_integer_mean_are_exact(device: str, generator: torch.Generator) -> None:
    half = integer_inputs(128, 40, generator=generator)
    x = torch.stack([half, -half], 1).reshape(256, 40) + 3  # neighbours cancel, so every mean is 3
    assert total_variance(x.to(device)).item() == 2 * half.square().sum().item()


def test_a_large_mean_costs_no_digits(device: str, generator: torch.Generator) -> None:
    x = torch.randn(500, 20, generator=generator) + 1e4
    exact = (x.double() - x.double().mean(0)).square().sum()
    assert total_variance(x.to(device)).item() == pytest.approx(exact.item(), rel=1e-4)


def test_one_bad_number_makes_the_result_nan(device: str) -> None:
    x = torch.ones(70, 5)
    x[66, 3] = torch.nan
    assert total_variance(x.to(device)).isnan()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x: expected the shape \[B, d_in\], got \[3\]"):
        total_variance(torch.zeros(3))
    with pytest.raises(DtypeError, match="x: expected a float tensor"):
        total_variance(torch.zeros(3, 4, dtype=torch.int64))

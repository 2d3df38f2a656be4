from __future__ import annotations

import math

import pytest
import torch

from flashsae.metrics import FVU, norm_limit, variance_spread


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e170])  # squares of the others are not in the range of float64
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e10])
def test_fvu_over_batches_is_that_of_the_whole_set(mean: float, scale: float, generator: torch.Generator) -> None:
    x = torch.randn(1000, 7, generator=generator, dtype=torch.float64)
    x[0] *= 1e4  # the first batch is not like the others
    x_hat = x + 0.3 * torch.randn(1000, 7, generator=generator, dtype=torch.float64)
    fvu = FVU()
    for part in (slice(0, 0), slice(0, 13), slice(13, 700), slice(700, 1000)):
        fvu.update((x[part] + mean) * scale, (x_hat[part] + mean) * scale)
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu.compute() == pytest.approx(expected.item(), rel=1e-9 if mean < 1e10 else 1e-5)  # x + mean is rounded


def test_fvu_of_nothing_and_of_a_constant() -> None:
    assert math.isnan(FVU().compute())
    constant = FVU()
    constant.update(torch.ones(4, 2), torch.ones(4, 2))
    assert constant.compute() == 0.0
    constant.update(torch.ones(4, 2), torch.zeros(4, 2))
    assert constant.compute() == math.inf


def test_what_rounding_leaves_of_a_constant_is_no_variance() -> None:
    fvu = FVU()
    for part in torch.full((1000, 3), 0.1, dtype=torch.float64).split(7):
        fvu.update(part, part + 1e-9)
    assert fvu.compute() == math.inf


def test_the_spread_of_the_variance_names_the_few_tokens_that_hold_it(generator: torch.Generator) -> None:
    x = torch.randn(2000, 16, generator=generator)
    even = variance_spread(x)
    assert not even.is_concentrated
    assert (even.tokens, even.outliers, even.outlier_share) == (2000, 0, 0.0)
    assert 0.001 < even.top_permille < even.top_percent < 0.05
    x[::250] *= 42  # 8 tokens
    uneven = variance_spread(x)
    assert uneven.is_concentrated
    assert uneven.outliers == 8
    squares = (x.double() - x.double().mean(0)).square().sum(1)
    assert uneven.outlier_share == pytest.approx((squares[::250].sum() / squares.sum()).item())
    assert uneven.outlier_share > 0.8
    assert uneven.top_permille < uneven.outlier_share < uneven.top_percent
    assert uneven.largest_ratio == pytest.approx((x.norm(dim=1).max() / x.norm(dim=1).median()).item())


def test_few_tokens_beside_a_large_mean_hold_the_variance_without_being_outliers(generator: torch.Generator) -> None:
    x = torch.randn(2000, 16, generator=generator)
    x[::250] *= 42
    spread = variance_spread(x + 1000)
    assert spread.outliers == 0
    assert spread.top_percent > 0.8
    assert spread.is_concentrated


@pytest.mark.parametrize("x", [torch.zeros(1, 3), torch.zeros(2000, 3), torch.eye(3), torch.ones(24, 2)])
def test_the_spread_of_next_to_nothing_is_no_error(x: torch.Tensor) -> None:
    assert not variance_spread(x).is_concentrated


def test_an_outlier_has_a_norm_above_ten_times_the_median() -> None:
    assert norm_limit(torch.tensor([1.0, 2.0, 30.0])) == 20.0
    assert norm_limit(torch.tensor([0.0, 0.0, 30.0])) == norm_limit(torch.zeros(0)) == math.inf

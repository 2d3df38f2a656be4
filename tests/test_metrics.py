from __future__ import annotations

import math

import pytest
import torch

from flashsae.metrics import FVU, LatentActivity, direction_recovery


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_fvu_over_batches_is_that_of_the_whole_set(mean: float, generator: torch.Generator) -> None:
    x = torch.randn(1000, 7, generator=generator, dtype=torch.float64) + mean
    x_hat = x + 0.3 * torch.randn(1000, 7, generator=generator, dtype=torch.float64)
    fvu = FVU()
    for part in (slice(0, 0), slice(0, 13), slice(13, 700), slice(700, 1000)):
        fvu.update(x[part], x_hat[part])
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu.compute() == pytest.approx(expected.item(), rel=1e-9)


def test_fvu_of_nothing_and_of_a_constant() -> None:
    assert math.isnan(FVU().compute())
    constant = FVU()
    constant.update(torch.ones(4, 2), torch.ones(4, 2))
    assert constant.compute() == 0.0
    constant.update(torch.ones(4, 2), torch.zeros(4, 2))
    assert constant.compute() == math.inf


def test_activity_counts_values_above_zero_only() -> None:
    activity = LatentActivity(4)
    activity.update(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[0, 1], [0, 2]]))
    activity.update(torch.tensor([[5.0, 0.0]]), torch.tensor([[2, 3]]))
    assert activity.latent_density().tolist() == [2 / 3, 0.0, 2 / 3, 0.0]
    assert activity.l0() == pytest.approx(4 / 3)
    assert activity.tokens == 3


def test_direction_recovery_ignores_length_and_counts_each_direction() -> None:
    directions = torch.eye(4)
    W_dec = torch.cat([directions[:3] * 7, -directions[3:]])
    assert direction_recovery(W_dec, directions) == 0.75
    assert direction_recovery(torch.ones(2, 4), directions, cosine=0.5) == 0.0
    assert direction_recovery(torch.ones(2, 4), directions, cosine=0.49) == 1.0

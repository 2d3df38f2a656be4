from __future__ import annotations

import pytest
import torch

from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError


def test_samples_are_sparse_sums_of_the_directions() -> None:
    model = SuperpositionModel(64, 40, active=3.0, seed=1)
    x = model.sample(4000, seed=2)
    torch.testing.assert_close(model.directions.norm(dim=1), torch.ones(40))
    magnitudes = torch.linalg.lstsq(model.directions.T, x.T).solution.T  # fewer than d_in: the sum can be undone
    is_active = magnitudes > 0.25
    assert is_active.sum(1).double().mean().item() == pytest.approx(3.0, rel=0.05)
    assert magnitudes[is_active].min() > 0.49
    assert magnitudes[is_active].max() < 1.51
    assert magnitudes[~is_active].abs().max() < 1e-3


def test_seeds_decide_and_noise_is_added() -> None:
    model = SuperpositionModel(8, 20, active=2.0, seed=1)
    assert torch.equal(model.sample(10, seed=5), model.sample(10, seed=5))
    assert not torch.equal(model.sample(10, seed=5), model.sample(10, seed=6))
    noisy = SuperpositionModel(8, 20, active=2.0, noise=0.1, seed=1)
    difference = noisy.sample(5000, seed=5) - model.sample(5000, seed=5)
    assert difference.std().item() == pytest.approx(0.1, rel=0.05)


def test_more_active_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="active: expected 0 < active <= n_directions = 4, got 5"):
        SuperpositionModel(8, 4, active=5)

from __future__ import annotations

import pytest
import torch

import flashsae
from flashsae import TrainConfig
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import FlashSAEError, FlashSAEWarning

SMALL = TrainConfig(batch_tokens=64, tokens=64 * 20, shuffle_tokens=256)
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)


def test_few_tokens_that_hold_the_variance_are_told_of() -> None:
    x = X.repeat(4, 1)
    x[::256] = 42 * x.norm(dim=1).median() * torch.nn.functional.normalize(torch.ones(8), dim=0)
    said = r"10 of 2,560 sampled tokens, with norms above 10 times the median, hold 85\.\d% .* --max-norm-ratio 10"
    with pytest.warns(FlashSAEWarning, match=said):
        flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)


def _equal_tokens(value: float) -> torch.Tensor:
    return torch.full((640, 8), value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (_equal_tokens(0.0), "the activations do not vary: 640 sampled tokens are equal"),
        (_equal_tokens(0.1), "the activations do not vary: 640 sampled tokens are equal"),
        (X.double() * 1e40, r"x: row \d+ holds numbers beyond float32 \(x times a constant helps\)"),
        (X.double() * 1e37, r"the activations reach \d\.\de\+37, where float32"),
        (X.double() * 1e-40, r"the activations reach \d\.\de-\d\d, where float32"),
        (X.double() * 1e-310, r"the activations reach \d\.\de-3\d\d, where float32"),
        (X * 1e-42, r"the activations reach \d\.\de-4\d, where float32"),
        (X.double() * 1e300, r"x: row \d+ holds numbers beyond float32"),
        (X.double() + 1e12, r"the activations vary less than float32 resolves beside values of 1\.0e\+12"),
        (torch.where(torch.arange(640)[:, None] == 600, torch.inf, X), r"x: row 600 holds NaN or Inf"),
        ([X[:100], torch.where(X > 2, torch.nan, X)], "the iterable x, .* hold NaN or Inf"),
        (
            [X[:100], X[:100].double()],
            r"batch 1 of the iterable x: expected torch\.float32 on cpu, .* got torch\.float64",
        ),
        ([X.double(), X.double() * 1e39], "the iterable x, .* hold numbers beyond float32"),
    ],
)
def test_data_that_nothing_can_be_learnt_from_is_named(x: torch.Tensor, message: str) -> None:
    with pytest.raises(FlashSAEError, match=message):
        flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)


def test_what_float32_rounds_away_of_data_beside_a_large_mean_is_told() -> None:
    with pytest.warns(FlashSAEWarning, match=r"float32 rounds the activations by \d+\.\d% of their variance"):
        flashsae.fit(X.double() + 4e6, d_sae=16, k=3, config=SMALL, progress=False)

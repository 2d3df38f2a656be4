from __future__ import annotations

import pytest

from flashsae import TrainConfig
from flashsae.errors import ConfigError
from flashsae.optim import default_lr


@pytest.mark.parametrize(("d_in", "d_sae"), [(384, 4096), (768, 8192), (512, 4096), (4096, 32768), (1, 8)])
def test_what_is_not_given_is_worked_out(d_in: int, d_sae: int) -> None:
    config = TrainConfig(k=1, tokens=1_000_000, batch_tokens=1000).resolve(d_in)
    assert config.d_in == d_in
    assert config.d_sae == d_sae
    assert config.lr == default_lr(d_sae)
    assert config.steps == 1000
    assert config.warmup_steps == 50
    assert config.dead_after_tokens == 100_000
    assert config.k_aux == min(1024, max(1, d_in // 2))


def test_what_is_given_is_kept() -> None:
    given = TrainConfig(d_sae=77, k=3, tokens=10, batch_tokens=4, lr=1.0, warmup_steps=0, k_aux=2, dead_after_tokens=5)
    config = given.resolve(8)
    assert (config.d_sae, config.lr, config.warmup_steps, config.k_aux, config.dead_after_tokens) == (77, 1.0, 0, 2, 5)
    assert config.steps == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k: expected a positive number, got 0"),
        ("tokens", -5, "tokens: expected a positive number, got -5"),
        ("batch_tokens", 0, "batch_tokens: expected a positive number, got 0"),
        ("lr", 0.0, r"lr: expected a positive number, got 0\.0"),
        ("lr", float("nan"), "lr: expected a positive number, got nan"),
        ("warmup_steps", -1, "warmup_steps: expected a number that is not negative, got -1"),
        ("decay_fraction", 1.5, r"decay_fraction: expected a fraction from 0 to 1, got 1\.5"),
        ("precision", "fp8", "precision: expected one of float32, tf32, bf16, got 'fp8'"),
        ("moments", "float16", "moments: expected one of float32, bf16, got 'float16'"),
        ("auxk_alpha", -0.1, r"auxk_alpha: expected a number that is not negative, got -0\.1"),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_k_above_d_sae_is_refused() -> None:
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 8, got 9"):
        TrainConfig(k=9).resolve(1)

from __future__ import annotations

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_aux": 65}, "k_aux: expected k_aux <= d_sae = 64, got 65"),
        ({"batch_tokens": 101}, "batch_tokens: expected batch_tokens <= tokens = 100, got 101"),
        ({"warmup_steps": 11}, "warmup_steps: expected warmup_steps <= the steps of this training = 10, got 11"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"d_sae": 64, "k": 4, "tokens": 100, "batch_tokens": 10, **settings}).resolve(8)  # type: ignore[arg-type]


def test_settings_that_only_look_odd_are_taken() -> None:
    config = TrainConfig(
        d_sae=64, k=64, tokens=100, batch_tokens=100, warmup_steps=1, decay_fraction=1.0, k_aux=64,
        dead_after_tokens=10**9, checkpoint_every_steps=10**9, log_every_steps=10**9,
    ).resolve(8)  # fmt: skip
    assert config.steps == 1
    assert TrainConfig(d_sae=3, k=1).resolve(100).k_aux == 3


def test_numbers_of_numpy_are_numbers_and_what_is_none_is_refused() -> None:
    config = TrainConfig(k=np.int64(3), lr=np.float32(0.5), tokens=np.uint8(200), decay_fraction=np.float64(0.25))  # type: ignore[arg-type]
    assert [type(value) for value in (config.k, config.lr, config.tokens, config.decay_fraction)] == [
        int, float, int, float,
    ]  # fmt: skip
    for name in ("lr", "clip_norm", "auxk_alpha", "decay_fraction", "k", "tokens", "seed"):
        for value in (float("nan"), True, np.bool_(1), "3", np.float64("nan"), torch.ones(2), [1]):
            with pytest.raises(ConfigError, match=f"{name}: expected "):
                TrainConfig(**{name: value})  # type: ignore[arg-type]
    for name in ("precision", "moments"):
        for value in (3, None, True, "float16", ["bf16"], torch.bfloat16):
            with pytest.raises(ConfigError, match=f"{name}: expected one of "):
                TrainConfig(**{name: value})  # type: ignore[arg-type]

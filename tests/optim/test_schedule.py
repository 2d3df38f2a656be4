from __future__ import annotations

import math
from typing import Any

import pytest

from flashsae import TrainConfig
from flashsae.optim import default_lr, learning_rate, lr_factor


def test_the_schedule_rises_stays_and_falls() -> None:
    factors = [lr_factor(step, 100, 10, 20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert [lr_factor(step, 3, 0, 0) for step in range(3)] == [1.0] * 3


def test_default_lr_scales_with_the_root_of_the_number_of_latents() -> None:
    assert default_lr(4096) == pytest.approx(2 * default_lr(16384))


def test_the_rise_may_begin_above_zero_and_be_a_cosine() -> None:
    def rise(**shape: Any) -> list[float]:
        return [lr_factor(step, 100, 4, 0, **shape) for step in range(6)]

    assert rise(start=0.2) == pytest.approx([0.4, 0.6, 0.8, 1, 1, 1])
    cosine = [(1 - math.cos(math.pi * part)) / 2 for part in (0.25, 0.5, 0.75, 1, 1, 1)]
    assert rise(warmup="cosine") == pytest.approx(cosine)
    assert rise(warmup="cosine", start=0.1) == pytest.approx([0.1 + 0.9 * part for part in cosine])
    assert rise() == [0.25, 0.5, 0.75, 1, 1, 1]
    assert lr_factor(0, 10, 0, 0, warmup="cosine", start=0.1) == 1.0
    assert lr_factor(9, 10, 10, 5, start=0.9) == pytest.approx(0.2)  # the lower of both holds


def test_the_settings_say_how_the_rate_rises_and_falls() -> None:
    config = TrainConfig(
        64, k=4, tokens=100, batch_tokens=1, lr=3.0, warmup="cosine", warmup_start=0.1, warmup_steps=10,
        decay_fraction=0.3,
    ).resolve(8)  # fmt: skip
    for step in range(100):
        expected = 3.0 * lr_factor(step, 100, 10, 30, warmup="cosine", start=0.1)
        assert learning_rate(step, config) == expected
    assert learning_rate(0, config) == pytest.approx(3 * (0.1 + 0.9 * (1 - math.cos(math.pi / 10)) / 2))

from __future__ import annotations

import pytest

from flashsae.optim import default_lr, lr_factor


def test_the_schedule_rises_stays_and_falls() -> None:
    factors = [lr_factor(step, 100, 10, 20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert [lr_factor(step, 3, 0, 0) for step in range(3)] == [1.0] * 3


def test_default_lr_scales_with_the_root_of_the_number_of_latents() -> None:
    assert default_lr(4096) == pytest.approx(2 * default_lr(16384))

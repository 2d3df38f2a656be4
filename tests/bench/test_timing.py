from __future__ import annotations

import pytest
import torch

from flashsae.bench.timing import Timing, float32_products, peak_bytes, tensor_bytes, time_runs

CPU = torch.device("cpu")


def test_a_timing_is_median_and_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 3.0]) == Timing(3.0, 1.4, 4.6, 3)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_runs_take_turns_and_are_repeated_often_enough() -> None:
    calls: list[tuple[str, int]] = []
    timings = time_runs([lambda i: calls.append(("a", i)), lambda i: calls.append(("b", i))], CPU, 1e-9)
    assert [timing.iterations for timing in timings] == [5, 5]
    assert [name for name, _ in calls] == ["a", "b"] * (4 + 5)  # four of a warm-up
    assert [i for name, i in calls[8:] if name == "a"] == [0, 1, 2, 3, 4]
    calls.clear()
    (timing,) = time_runs([lambda i: calls.append(("a", i))], CPU, 60.0)
    assert (timing.iterations, len(calls)) == (50, 54)
    assert timing.p10_ms <= timing.median_ms <= timing.p90_ms


def test_bytes_of_a_storage_count_once() -> None:
    x = torch.zeros(10, 3)
    assert tensor_bytes([x, x.T, x[2:], torch.zeros(2, dtype=torch.int64)]) == 120 + 16
    assert peak_bytes(lambda i: None, CPU, (x,)) is None


def test_products_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind in ("tf32", "ieee"):
        with float32_products(kind):
            assert matmul.fp32_precision == kind
            with float32_products(None):
                assert matmul.fp32_precision == kind
        assert matmul.fp32_precision == before

from __future__ import annotations

import pytest

from flashsae.metrics.numbers import compact, count, duration, percent, real, written


def test_few_of_many_are_not_none() -> None:
    assert [percent(fraction) for fraction in (0.0, 1 / 131072, 0.0005, 0.0625, 1.0)] == [
        "0.0%", "<0.1%", "0.1%", "6.2%", "100.0%",
    ]  # fmt: skip


def test_numbers_in_words() -> None:
    assert [compact(value) for value in (0, 950, 12345, 4.1e6, 2.5e9, float("nan"))] == [
        "0", "950", "12.3k", "4.1M", "2.5B", "not finite",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.4, 83.0, 7260)] == ["0 s", "1 min 23 s", "2 h 1 min"]
    assert [count(value) for value in (7.0, 1048576, True, "7", None)] == ["7", "1,048,576", *["not finite"] * 3]
    assert [real(value) for value in (3, 2.5, True, "3", None, float("nan"))] == [3.0, 2.5, None, None, None, None]


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (0.30534, ".4f", "0.3053"),
        (0.0, ".4f", "0.0000"),
        (2e-6, ".4f", "2.00e-06"),
        (-2e-6, ".4f", "-2.00e-06"),
        (123456.7, ".4f", "1.23e+05"),
        (0.5, ".1f", "0.5"),
        (0.004, ".1f", "4.00e-03"),
        (1e6, ",.0f", "1,000,000"),
        (0.2, ",.0f", "0"),
        (1e-5, ".3g", "1e-05"),
        (float("nan"), ".4f", "not finite"),
        (None, ",.0f", "not finite"),
    ],
)
def test_no_number_is_written_as_if_it_were_nothing(value: object, form: str, expected: str) -> None:
    assert written(value, form) == expected

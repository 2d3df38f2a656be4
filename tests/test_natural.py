from __future__ import annotations

import pytest

from flashsae.natural import did_you_mean, in_order


def test_numbers_count_as_numbers() -> None:
    assert in_order(["h.10", "h.9:in", "h.2", "ln"]) == ["h.2", "h.9:in", "h.10", "ln"]


@pytest.mark.parametrize(
    ("got", "hint"),
    [
        ("jumprelu", " Did you mean jump_relu?"),
        ("JumpReLU", " Did you mean jump_relu?"),
        ("bf16int8", " Did you mean bf16-int8?"),
        ("float16", ""),  # like float32, and something else
        ("fp32", ""),
        ("", ""),
        (7, ""),
        (None, ""),
    ],
)
def test_a_near_name_is_asked_for(got: object, hint: str) -> None:
    assert did_you_mean(got, ["jump_relu", "topk", "bf16-int8", "float32"]) == hint


def test_how_near_it_has_to_be_can_be_said() -> None:
    assert did_you_mean("float16", ["float32"], 0.6) == " Did you mean float32?"
    assert did_you_mean("x", []) == ""

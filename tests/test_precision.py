from __future__ import annotations

from typing import get_args

import pytest

from flashsae.precision import Operand, Precision, has_screen, is_rounded, operand_of


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_has_operands(precision: Precision) -> None:
    assert operand_of(precision) in get_args(Operand)
    assert precision.partition("-")[0] == operand_of(precision)
    assert has_screen(precision) == precision.endswith("-int8")
    assert is_rounded(precision) == precision.startswith("bf16")


def test_none_is_neither_rounded_nor_screened() -> None:
    assert not is_rounded(None)
    assert not has_screen(None)

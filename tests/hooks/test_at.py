"""Positions as people say them, in one forward and over several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashsae.errors import ConfigError, DtypeError, FlashSAEError, ShapeError
from flashsae.hooks.at import At, Window

PROMPT, STEP = Window(2, 0, 5, 5), Window(2, 6, 7, 5)
CPU = torch.device("cpu")


def places(given: Any, window: Window) -> Any:
    mask = At(given).mask(window, CPU)
    if mask is None:
        return "all"
    return [window.first + int(place) for place in mask.nonzero()[:, -1]] if mask.dim() == 1 else mask.tolist()


@pytest.mark.parametrize(
    ("given", "prompt", "step"),
    [
        (None, "all", "all"),
        (2, [2], []),
        (6, [], [6]),
        (-1, [4], []),
        (torch.tensor(2), [2], []),
        ([0, 3, 6], [0, 3], [6]),
        (range(2, 9), [2, 3, 4], [6]),
        (np.array([1, 4]), [1, 4], []),
        ([], [], []),
        ("prompt", [0, 1, 2, 3, 4], []),
        ("new", [], [6]),
        (slice(1, None), [1, 2, 3, 4], [6]),
        (slice(1, 4), [1, 2, 3], []),
        (slice(-2, None), [3, 4], [6]),
        (slice(None, -3), [0, 1], []),
        (slice(-20, 2), [0, 1], []),
        (slice(0, None, 3), [0, 3], [6]),
        ([True, False, True], [0, 2], []),
        (torch.tensor([False] * 6 + [True]), [], [6]),
        (np.array([False, True]), [1], []),
    ],
    ids=repr,
)
def test_positions_go_on_over_the_steps(given: Any, prompt: Any, step: Any) -> None:
    assert places(given, PROMPT) == prompt
    assert places(given, STEP) == step


def test_a_mask_has_a_row_for_each_sequence() -> None:
    rows = [[True, False], [False, False]]
    assert places(rows, PROMPT) == [[True, False, False, False, False], [False] * 5]
    assert places(torch.tensor(rows[:1]), PROMPT) == [[True, False, False, False, False]]
    with pytest.raises(ShapeError, match="expected a mask of 3 sequences, as many as the model reads at once, got 2"):
        At(rows).mask(Window(3, 0, 5, 5), CPU)


def test_a_mask_is_what_it_was() -> None:
    mask = torch.tensor([True, False])
    at = At(mask)
    mask[:] = False
    assert at.mask(Window(1, 0, 2, 2), CPU).tolist() == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("last", ConfigError, r'at: expected "prompt", "new" or positions, got \'last\''),
        (1.5, DtypeError, "at: expected positions: an int, several, a slice.* got float"),
        (True, DtypeError, "got bool"),
        ([1, "2"], DtypeError, "got str"),
        (torch.ones(2, 5, dtype=torch.int64), DtypeError, r"a mask of bool.* got \[2, 5\] of torch.int64"),
        (torch.ones(1, 2, 5, dtype=torch.bool), ShapeError, r"of bool, got \[1, 2, 5\] of bool"),
        ([[1, 0]], ShapeError, r"of bool, got \[1, 2\] of int64"),
        (slice(4, 1, -1), ConfigError, "a slice whose step is 1 or more, got -1"),
        (slice("a", None), DtypeError, "got str"),
    ],
)
def test_what_is_no_position_is_refused(given: Any, error: type[FlashSAEError], message: str) -> None:
    with pytest.raises(error, match=message):
        At(given)


def test_a_position_before_the_first_is_refused() -> None:
    with pytest.raises(ShapeError, match="at: the prompt has 5 positions, and none is -6"):
        At(-6).mask(PROMPT, CPU)


def test_positions_beyond_a_text() -> None:
    assert At([1, 7]).beyond(5) == 7
    assert At([1, 4]).beyond(5) is None
    assert At([[False] * 6, [False] * 5 + [True]]).beyond(5) == 5
    assert At([[True] * 5 + [False]]).beyond(5) is None
    assert At(slice(7, 9)).beyond(5) is At("new").beyond(5) is At(None).beyond(5) is None


def test_they_are_told() -> None:
    told = [repr(At(given)) for given in (3, [1, 2], "new", slice(1, None), [True])]
    assert told == ["[3]", "[1, 2]", "'new'", "slice(1, None, None)", "a mask [1]"]

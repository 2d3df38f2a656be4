"""Rows that are done as a whole: few, many, none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flashsae.ops.encode import redo
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.redo import no_rows, redo_rows
from flashsae.testing import integer_inputs, poison_empty
from helpers.on_both import DEVICE
from helpers.screens import brute_force, exact_pre_acts

F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    ([], 40, 2, F32, False),
    ([4], 700, 3, F32, False),
    ([6, 0, 2, 3, 5], 530, 33, BF16, True),
    ([1, 2], 5, 5, BF16, False),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("slots", [1, 6, 2048])
@pytest.mark.parametrize(("rows", "n", "k", "dtype", "magnitude"), CASES)
def test_t0_only_rows_of_the_list_are_done(
    rows: list[int], n: int, k: int, dtype: torch.dtype, magnitude: bool, slots: int, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(redo, "SLOTS", slots)
    monkeypatch.setattr(redo, "PROGRAMS", 3)
    x, W = integer_inputs(7, 10, generator=generator).to(dtype), integer_inputs(n, 10, generator=generator).to(dtype)
    W[3::7], W[n // 2, 0] = W[0], torch.nan
    scale = torch.randint(0, 3, (n,), generator=generator).float()
    keys = Keys(integer_inputs(n, generator=generator), scale, magnitude)
    todo = no_rows(7, torch.device(DEVICE))
    todo[: 1 + len(rows)] = torch.tensor([len(rows), *rows])
    acts, indices = torch.full((7, k), -1.0, device=DEVICE), torch.full((7, k), -1, device=DEVICE)
    on_device = Keys(keys.b_enc.to(DEVICE), scale.to(DEVICE), magnitude)
    with poison_empty():
        redo_rows(x.to(DEVICE), W.to(DEVICE), on_device, k, todo, (acts, indices))
    pre_acts = exact_pre_acts(x, W, keys)
    values, expected = brute_force(pre_acts, keys.of(pre_acts), k)
    others = torch.tensor([row for row in range(7) if row not in rows])
    values[others], expected[others] = -1.0, -1
    assert torch.equal(indices.cpu(), expected)
    torch.testing.assert_close(acts.cpu().double(), values, rtol=0, atol=0, equal_nan=True)

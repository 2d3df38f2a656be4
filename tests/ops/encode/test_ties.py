"""Ties of values that are not finite: the lowest index wins, of overflowed ones whatever their real size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.ops import encode_topk
from flashsae.ops.encode.reference import select_topk
from flashsae.ops.encode.screen import always
from helpers.on_both import on_kernels, on_reference

N, D, K = 130, 4, 2
SOME = torch.tensor([3, 77, 78, 120, 129])
BACKENDS = {"kernels": on_kernels, "reference": on_reference}


def _operands(generator: torch.Generator) -> dict[str, Tensor]:
    W = torch.randint(1, 5, (N, D), generator=generator).float()  # sums are exact in every precision
    return {"x": torch.ones(1, D), "W": W, "b": torch.zeros(N), "scale": torch.ones(N)}


def _dots_overflow(p: dict[str, Tensor]) -> None:
    p["x"] *= 2.0**66
    p["W"] *= 2.0**62


def _some_dots_overflow(p: dict[str, Tensor]) -> None:
    _dots_overflow(p)
    p["W"][:50] *= 2.0**-20


def _all_dots_overflow_below(p: dict[str, Tensor]) -> None:
    _dots_overflow(p)
    p["W"] *= -1


def _keys_overflow(p: dict[str, Tensor]) -> None:
    p["scale"] *= 2.0**126


def _biases_are_no_numbers(p: dict[str, Tensor]) -> None:
    p["b"][SOME] = torch.nan


def _a_token_is_no_number(p: dict[str, Tensor]) -> None:
    p["x"][0, 2] = torch.nan


CASES = [
    _dots_overflow,
    _some_dots_overflow,
    _all_dots_overflow_below,
    _keys_overflow,
    _biases_are_no_numbers,
    _a_token_is_no_number,
]


def _ranked(p: dict[str, Tensor], *, magnitude: bool) -> Tensor:
    keys = (p["x"] @ p["W"].T + p["b"]) * p["scale"]
    keys = keys.abs() if magnitude else keys
    return keys.sort(dim=1, descending=True, stable=True).indices[:, :K].sort(dim=1).values


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "precision", "case"),
    [
        *(("reference", "float32", case) for case in CASES),
        *(("kernels", "float32", case) for case in CASES),
        *(("kernels", precision, _dots_overflow) for precision in ("bf16", "float32-int8", "bf16-int8")),
    ],
)
def test_the_lowest_index_wins(
    backend: str, precision: Any, case: Callable[[dict[str, Tensor]], None], generator: torch.Generator
) -> None:
    p = _operands(generator)
    case(p)
    magnitude = case is _some_dots_overflow

    def selected(q: dict[str, Tensor]) -> dict[str, Tensor]:
        options = {"key_scale": q["scale"], "magnitude": magnitude, "precision": precision}
        return {"latents": encode_topk(q["x"], q["W"], q["b"], K, **options).pattern.latents}

    with always() if "int8" in precision else nullcontext():
        found = BACKENDS[backend](selected, p)["latents"]
    assert torch.equal(found, _ranked(p, magnitude=magnitude))


@pytest.mark.parametrize("n", [5, 40, 300])
def test_the_reference_ranks_nan_first_and_the_lowest_of_them(n: int, generator: torch.Generator) -> None:
    keys = torch.randint(-2, 3, (200, n), generator=generator).float()
    keys[torch.rand(200, n, generator=generator) < torch.rand(200, 1, generator=generator)] = torch.nan
    keys[torch.rand(200, n, generator=generator) < 0.1] = torch.inf
    for k in (1, 3, n):
        expected = keys.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(select_topk(keys, k), expected)

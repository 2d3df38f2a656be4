"""Weights in two halves of 16 bits: bfloat16 for products to read, the rest beside it, and no bit of float32 lost."""

from __future__ import annotations

import pytest
import torch

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.adam_rows import AdamRule, adam_rows
from flashsae.ops.adam_rows.reference import merge_halves, split_halves
from flashsae.ops.factors import RowGradient
from flashsae.testing import assert_as_accurate
from helpers.latent_pass import BACKENDS, EVERY_NAN, dense_step, pass_inputs, scalars, step_on
from helpers.on_both import as_float64

BF16, F32 = torch.bfloat16, torch.float32
EXTREMES = [0.0, -0.0, 1.0, 1e-45, -1e-45, 1e-39, 1e30, 3.4028235e38, -3.4028235e38]


def test_halves_merge_to_the_same_bits(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator).int()
    any_finite = bits.view(F32)[bits.view(F32).isfinite()]
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(F32)
    numbers = torch.cat([any_finite, ties, torch.tensor([*EXTREMES, torch.inf, -torch.inf])])
    high, low = split_halves(numbers)
    assert (high.dtype, low.dtype) == (BF16, torch.int16)
    assert torch.equal(merge_halves(high, low).view(torch.int32), numbers.view(torch.int32))


def test_the_high_half_is_rounded_to_nearest(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator).int()
    any_finite = bits.view(F32)[bits.view(F32).isfinite()]
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(F32)
    numbers = torch.cat([any_finite, ties, torch.tensor(EXTREMES[:5])])
    high, _ = split_halves(numbers)
    error = (high.double() - numbers.double()).abs()
    assert bool((error <= (numbers.bfloat16().double() - numbers.double()).abs()).all())


def test_the_halves_of_every_nan_are_nan() -> None:
    high, low = split_halves(EVERY_NAN)
    assert bool(EVERY_NAN.isnan().all())
    assert bool(high.isnan().all())
    assert bool(merge_halves(high, low).isnan().all())


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("d", [7, 600])
def test_a_step_on_halves_is_that_on_whole_weights_bit_for_bit(
    d: int, unit_norm: bool, backend: str, generator: torch.Generator
) -> None:
    p = pass_inputs(9, 2, 5, d, "sparse", generator, integer=False)
    whole = step_on(backend, p, AdamRule(unit_norm=unit_norm))
    split = step_on(backend, p, AdamRule(unit_norm=unit_norm), split=True)
    for name in whole:
        assert torch.equal(whole[name], split[name]), name
    assert not torch.equal(whole["weights"], whole["weights"].bfloat16().float())


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_weights_pass_a_step_of_zero_unchanged(backend: str) -> None:
    weights = torch.tensor([EXTREMES])
    p = {"weights": weights, "exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.ones_like(weights)}
    after = step_on(backend, p, AdamRule(), split=True)["weights"]
    assert torch.equal(after.view(torch.int32), weights.view(torch.int32))


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_have_no_low_halves_are_rounded_once(backend: str, generator: torch.Generator) -> None:
    p = pass_inputs(9, 2, 5, 7, "sparse", generator, integer=False)
    p["weights"] = p["weights"].bfloat16()
    exact = dense_step(as_float64(p), AdamRule())["weights"]
    ours = step_on(backend, p, AdamRule())["weights"]
    assert_as_accurate(ours, exact.bfloat16(), exact)
    assert not torch.equal(ours, p["weights"])


def test_halves_that_do_not_fit_are_named() -> None:
    rule, weights = AdamRule(), torch.zeros(4, 3)
    with pytest.raises(ShapeError, match=r"low: expected the shape \[4, 3\], got \[4, 2\]"):
        adam_rows(
            weights.bfloat16(),
            (weights, weights),
            RowGradient(),
            *scalars(rule, 1),
            rule,
            low=torch.zeros(4, 2).short(),
        )
    with pytest.raises(DtypeError, match=r"weights and low: .* got torch\.float32 and torch\.int16"):
        adam_rows(weights, (weights, weights), RowGradient(), *scalars(rule, 1), rule, low=weights.short())

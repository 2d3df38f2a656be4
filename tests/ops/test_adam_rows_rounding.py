"""Moments in bfloat16 are those of float32 rounded stochastically, with noise that is known and has mean zero."""

from __future__ import annotations

import pytest
import torch

from flashsae.ops.adam_rows import AdamRule
from flashsae.ops.adam_rows.reference import round_stochastically
from helpers.latent_pass import BACKENDS, EVERY_NAN, dense_step, pass_inputs, step_on
from helpers.on_both import as_float64

BF16 = torch.bfloat16


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("d", [37, 600])
def test_bfloat16_moments_are_those_of_float32_rounded_to_the_same_bits(
    d: int, step: int, backend: str, generator: torch.Generator
) -> None:
    rule = AdamRule(beta1=0.5, beta2=0.5)  # moments of integers are exact with these
    p = pass_inputs(37, 3, 5, d, "sparse", generator, integer=True)
    p["coeffs"] *= 37  # more digits than bfloat16 has
    p["exp_avg"], p["exp_avg_sq"] = p["exp_avg"].bfloat16().float(), p["exp_avg_sq"].bfloat16().float()
    ours, exact = step_on(backend, p, rule, step, moments=BF16), dense_step(as_float64(p), rule)
    for number, name in enumerate(("exp_avg", "exp_avg_sq")):
        rounded = round_stochastically(exact[name].float(), torch.tensor(float(step)), number)
        assert ours[name].dtype == BF16
        assert torch.equal(ours[name], rounded), name
        assert not torch.equal(ours[name].double(), exact[name])


def test_stochastic_rounding_has_the_right_mean_and_errs_by_less_than_a_unit(generator: torch.Generator) -> None:
    values = torch.randn(8, 40, generator=generator) * 10.0 ** torch.randint(-30, 30, (8, 40), generator=generator)
    unit = 2.0 ** (torch.frexp(values).exponent.double() - 8)
    steps, errors = 1000, []
    for step in range(1, steps + 1):
        for number in (0, 1):
            rounded = round_stochastically(values, torch.tensor(float(step)), number)
            errors.append((rounded.double() - values.double()) / unit)
    by_moment = torch.stack(errors).view(steps, 2, 8, 40)
    assert bool((by_moment.abs() < 1).all())
    mean = by_moment.mean(0)
    assert mean.abs().max().item() < 5 * 0.5 / steps**0.5
    assert mean.mean().abs().item() < 5 * 0.5 / (steps * mean.numel()) ** 0.5


def test_stochastic_rounding_gives_each_number_and_step_and_moment_its_own_noise() -> None:
    values = torch.full((64, 64), 1 + 2.0**-8)  # half way between two numbers of bfloat16

    def rounded_up(step: float, number: int) -> torch.Tensor:
        """Return 0.5 where a value was rounded up, -0.5 where it was rounded down."""
        return (round_stochastically(values, torch.tensor(step), number) > 1).double() - 0.5

    noise = rounded_up(1.0, 0)
    others = [rounded_up(2.0, 0), rounded_up(1.0, 1), noise.T, noise.roll(1, 0), noise.roll(1, 1)]
    for other in others:
        assert abs(4 * (noise * other).mean().item()) < 5 / 64


def test_stochastic_rounding_keeps_what_bfloat16_holds() -> None:
    values = torch.tensor([[0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf, 2.0**-133]])
    for step in range(50):
        for number in (0, 1):
            t = torch.tensor(float(step))
            rounded = round_stochastically(values, t, number).float()
            assert torch.equal(rounded.view(torch.int32), values.view(torch.int32))
            assert bool(round_stochastically(EVERY_NAN[None], t, number).isnan().all())

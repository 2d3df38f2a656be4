from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashsae import JumpReLUSettings
from flashsae.testing import assert_as_accurate
from helpers.on_both import as_float64, assert_same, on_kernels, on_reference
from helpers.sae_steps import dense_step, our_step, parameters_of
from helpers.steps import Tensors

BASE = JumpReLUSettings(target_l0=4.0, penalty="l0", sparsity_weight=0.5, bandwidth=4.0)
FORMS = {
    "l0": BASE,
    "quadratic": replace(BASE, penalty="quadratic", frequency_weight=0.25, frequency_scale=0.125),
    "everywhere": replace(BASE, ste_to_input=True, frequency_weight=0.25, frequency_scale=0.125),
}
TANH = replace(BASE, penalty="tanh", bandwidth=0.4)


def inputs_of(arch: Any, generator: torch.Generator, *, integer: bool, B: int = 8, n: int = 40) -> Tensors:
    dtype = torch.float32
    found = parameters_of(arch, B, 8, n, generator, integer=integer, dtype=dtype)
    threshold = found["threshold"].abs() + 1 if integer else found["threshold"].abs() + 0.1
    return {**found, "threshold": threshold}


def without_unit(found: Tensors) -> Tensors:
    return {name: tensor for name, tensor in found.items() if name != "grad unit"}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_bitwise_that_of_the_dense_formulas(form: str, generator: torch.Generator) -> None:
    arch = FORMS[form]
    inputs = inputs_of(arch, generator, integer=True)
    exact = dense_step(arch, as_float64(inputs))
    assert exact["grad threshold"].count_nonzero() > 10
    assert 0 < exact["latent_acts"].count_nonzero() < 160
    ours, theirs = (run(lambda given: our_step(arch, given), inputs) for run in (on_kernels, on_reference))
    assert_same(ours, theirs, exact)


@pytest.mark.parametrize(
    "arch",
    [replace(FORMS["quadratic"], bandwidth=0.4), replace(BASE, bandwidth=0.4, ste_to_input=True), TANH],
    ids=["quadratic", "everywhere", "tanh"],
)
@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_a_step_is_as_accurate_as_dense_pytorch_and_repeats(run: Any, arch: Any, generator: torch.Generator) -> None:
    inputs = inputs_of(arch, generator, integer=False, B=37, n=70)
    ours, again = (run(lambda given: our_step(arch, given, unit=1.5), inputs) for _ in range(2))
    peer, exact = dense_step(arch, inputs, unit=1.5), dense_step(arch, as_float64(inputs), unit=1.5)
    assert set(ours) == set(exact)
    for name, truth in exact.items():
        assert torch.equal(ours[name], again[name]), name
        assert_as_accurate(ours[name], peer[name], truth, name)

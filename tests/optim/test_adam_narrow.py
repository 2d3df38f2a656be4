"""Weights in two halves and moments in bfloat16: the first lose no bit, the second follow those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flashsae.data.synthetic import SuperpositionModel
from flashsae.ops import FactoredGradient
from flashsae.ops.factors import RowFactor
from flashsae.optim import FactoredAdam
from helpers.adam import F32, F64, LR, D, N, factored_adam, loss_of, make_sae

BF16 = torch.bfloat16


@pytest.mark.parametrize("unit_norm", [False, True])
def test_split_weights_lose_no_bit_of_what_float32_weights_learn(
    unit_norm: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr("flashsae.optim.operands._ROWS", 7)  # rows are split and merged in pieces
    start = nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    whole, split = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    of_whole = FactoredAdam([whole], 1e-4, unit_norm=unit_norm)
    of_split = FactoredAdam([split], 1e-4, unit_norm=unit_norm, split_weights=True)
    assert (whole.dtype, split.dtype) == (F32, BF16)
    slots = torch.arange(N, dtype=torch.int32)
    for _ in range(50):
        gradient = torch.randn(N, D, generator=generator)
        for parameter, optimizer in ((whole, of_whole), (split, of_split)):
            optimizer.zero_grad()
            parameter.grad = FactoredGradient([RowFactor(gradient.clone(), slots)], parameter)
            optimizer.clip_grad_norm(5.0)
            optimizer.step()
        merged = of_split.float32_weights(split)
        assert merged.dtype == F32
        assert torch.equal(merged, whole)
    assert not torch.equal(merged, split.float())
    assert torch.equal(of_whole.float32_weights(whole), whole)
    torch.testing.assert_close(split.float(), whole.detach(), rtol=2**-8, atol=0.0)


def test_products_of_a_split_sae_read_bfloat16_and_it_learns_as_well() -> None:
    x = SuperpositionModel(D, 2 * D, active=1.5).sample(4000, seed=1)

    def loss_after_training(weights_dtype: torch.dtype, **kind: Any) -> float:
        sae = make_sae()
        optimizer = factored_adam(sae, **kind)
        assert sae.W_dec.dtype == sae.W_enc_T.dtype == weights_dtype
        assert sae.b_enc.dtype == sae.b_dec.dtype == F32
        for batch in x.split(50):
            optimizer.zero_grad()
            loss_of(sae, batch).backward()
            optimizer.step()
        return loss_of(sae, x).item()

    wide = loss_after_training(F32)
    split = loss_after_training(BF16, split_weights=True)
    narrow_moments = loss_after_training(F32, state_dtype=BF16)
    both = loss_after_training(BF16, split_weights=True, state_dtype=BF16)
    assert wide < 0.5
    assert [split, narrow_moments, both] == pytest.approx([wide] * 3, rel=0.05)
    assert len({wide, split, narrow_moments, both}) == 4


def test_bfloat16_moments_follow_those_of_float32(generator: torch.Generator) -> None:
    """Rounded to nearest, exp_avg_sq would stand still: a step changes it by less than half a unit of bfloat16."""
    wide, narrow = nn.Parameter(torch.zeros(40, 25)), nn.Parameter(torch.zeros(40, 25))
    of_wide, of_narrow = FactoredAdam([wide], LR), FactoredAdam([narrow], LR, state_dtype=BF16)
    for _ in range(400):
        gradient = 1 + 0.1 * torch.randn(40, 25, generator=generator)
        wide.grad, narrow.grad = gradient.clone(), gradient.clone()
        of_wide.step()
        of_narrow.step()
    for name in ("exp_avg", "exp_avg_sq"):
        theirs, ours = of_wide.state[wide][name], of_narrow.state[narrow][name]
        assert (theirs.dtype, ours.dtype) == (F32, BF16)
        assert ours.double().mean().item() == pytest.approx(theirs.double().mean().item(), rel=2e-3)
        torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.0)
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.0)
    assert narrow.mean().item() == pytest.approx(wide.mean().item(), rel=2e-3)


def test_moments_of_biases_and_float64_weights_are_never_rounded() -> None:
    bias, wide = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 2, dtype=F64))
    optimizer = FactoredAdam([bias, wide], LR, state_dtype=BF16)
    assert optimizer.state[bias]["exp_avg_sq"].dtype == F32
    assert optimizer.state[wide]["exp_avg_sq"].dtype == F64

"""Clipping by the global norm, over factors: the norm is torch's, and nothing but the gradient is scaled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashsae import SAE
from flashsae.ops import materialize, take_rows
from helpers.adam import (
    F64,
    N,
    assert_same_parameters,
    dense_adam,
    factored_adam,
    give,
    gradients_of,
    loss_of,
    make_batches,
    make_sae,
)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_that_of_torch(max_norm: float, generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    factored, adam = factored_adam(ours), dense_adam(theirs)
    for x in make_batches(generator, 3, F64):
        give(theirs, gradients_of(ours, x))
        theirs.project_decoder_grad()
        factored.zero_grad()
        loss_of(ours, x).backward()
        for limit in (max_norm, 1e9):  # the second call reads the norm that the first has left
            norm = factored.clip_grad_norm(limit)
            assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), limit).item(), rel=1e-12)
        factored.step()
        adam.step()
    assert_same_parameters(ours, theirs)


def clip(sae: SAE) -> None:
    """Clip ordinary gradients as everybody does."""
    sae.project_decoder_grad()
    nn.utils.clip_grad_norm_(sae.parameters(), 1e-3)


def assert_same_gradients(ours: SAE, theirs: SAE) -> None:
    materialize(ours.parameters())
    ours.project_decoder_grad()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("times", [1, 2], ids=["decoded once", "decoded twice"])
def test_clipping_leaves_a_code_alone_whose_activations_the_gradient_holds(
    times: int, generator: torch.Generator
) -> None:
    """Decoded twice, the two factors of the gradient hold the same activations."""
    ours, theirs = make_sae(F64), make_sae(F64)
    optimizer = factored_adam(ours)
    (x,) = make_batches(generator, 1, F64)
    codes = [sae.encode(x) for sae in (ours, theirs)]
    for sae, code in zip((ours, theirs), codes):
        loss = (x - sae.decode(code)).square().sum()
        if times == 2:
            loss = loss + (x - 2 * sae.decode(code)).square().sum()
        loss.backward()
    before = codes[1].top_acts.detach().clone()
    optimizer.clip_grad_norm(1e-3)
    assert torch.equal(codes[0].top_acts, before)
    clip(theirs)
    assert_same_gradients(ours, theirs)


def test_clipping_scales_rows_once_that_share_memory(generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    optimizer = factored_adam(ours)
    for sae in (ours, theirs):  # the gradient of the sum is one number, expanded
        take_rows(sae.W_dec, torch.arange(N), torch.arange(N, dtype=torch.int32)).sum().backward()
    optimizer.clip_grad_norm(1e-3)
    clip(theirs)
    assert_same_gradients(ours, theirs)

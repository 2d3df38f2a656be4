"""A training with FactoredAdam is that with torch.optim.Adam, whatever gradients backward passes leave."""

from __future__ import annotations

import torch
from torch import nn

from flashsae.ops import FactoredGradient, SparseCode, collect_factors, decode_loss, take_rows
from flashsae.optim import ADAM_EPS, FactoredAdam
from helpers.adam import (
    F32,
    F64,
    LR,
    B,
    D,
    K,
    N,
    assert_parameters_as_accurate,
    assert_same_parameters,
    dense_adam,
    factored_adam,
    give,
    gradients_of,
    loss_of,
    make_batches,
    make_sae,
)


def test_a_training_in_float64_is_that_with_torch_adam(generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    factored, adam = factored_adam(ours), dense_adam(theirs)
    for x in make_batches(generator, 15, F64):
        give(theirs, gradients_of(ours, x))
        adam.step()
        factored.zero_grad()
        loss_of(ours, x).backward()
        assert isinstance(ours.W_dec.grad, FactoredGradient)
        assert isinstance(ours.W_enc_T.grad, FactoredGradient)
        factored.step()
        assert_same_parameters(ours, theirs)


def test_t1_a_training_in_float32_is_that_with_torch_adam(generator: torch.Generator) -> None:
    ours, theirs, exact = make_sae(F32), make_sae(F32), make_sae(F64)
    factored, adam, exact_adam = factored_adam(ours), dense_adam(theirs), dense_adam(exact)
    for x in make_batches(generator, 15):
        gradients = gradients_of(ours, x)
        give(theirs, gradients)
        give(exact, gradients)
        adam.step()
        exact_adam.step()
        factored.zero_grad()
        loss_of(ours, x).backward()
        assert isinstance(ours.W_dec.grad, FactoredGradient)
        assert isinstance(ours.W_enc_T.grad, FactoredGradient)
        factored.step()
        assert_parameters_as_accurate(ours, theirs, exact)


def test_t1_gradients_accumulate_over_small_batches(generator: torch.Generator) -> None:
    ours, theirs, exact = make_sae(F32), make_sae(F32), make_sae(F64)
    factored, adam, exact_adam = factored_adam(ours), dense_adam(theirs), dense_adam(exact)
    for _ in range(4):
        parts = make_batches(generator, 3)
        gradients = [gradients_of(ours, x) for x in parts]
        for sae in (theirs, exact):
            dtype = sae.W_dec.dtype
            give(sae, {name: torch.stack([g[name].to(dtype) for g in gradients]).sum(0) for name in gradients[0]})
        adam.step()
        exact_adam.step()
        for x in parts:
            loss_of(ours, x).backward()
        factored.step()
        factored.zero_grad()
        assert_parameters_as_accurate(ours, theirs, exact)


def test_ordinary_gradients_are_added_to_the_factors(generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    factored, adam = factored_adam(ours), dense_adam(theirs)
    for x in make_batches(generator, 3, F64):
        for sae, optimizer in ((ours, factored), (theirs, adam)):
            sae.zero_grad()
            (loss_of(sae, x) + sae.W_enc_T.square().sum() + (sae.W_dec[:, 0] ** 3).sum()).backward()
            optimizer.step()
    assert_same_parameters(ours, theirs)


def test_factors_of_aux_and_main_loss_meet_in_one_step(generator: torch.Generator) -> None:
    """A sparse part and a part of some rows, as AuxK leaves them."""
    slots = torch.full((N,), -1, dtype=torch.int32)
    latents = torch.tensor([4, 11])
    slots[latents] = torch.arange(2, dtype=torch.int32)
    start, x = torch.randn(N, D, generator=generator, dtype=F64), make_batches(generator, 1, F64)[0]
    codes = torch.rand(B, N, generator=generator).topk(K).indices
    acts = torch.rand(B, K, generator=generator, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    factored, adam = FactoredAdam([ours], LR), torch.optim.Adam([theirs], LR, eps=ADAM_EPS)
    for _ in range(3):
        for W, optimizer in ((ours, factored), (theirs, adam)):
            optimizer.zero_grad()
            loss = decode_loss(SparseCode.topk(acts, codes, N), W, None, x).loss
            (loss + (take_rows(W, latents, slots) ** 4).sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_zero_grad_forgets_factors_and_gradients(generator: torch.Generator) -> None:
    sae = make_sae()
    optimizer = factored_adam(sae)
    loss_of(sae, make_batches(generator, 1)[0]).backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in sae.parameters())
    assert optimizer.clip_grad_norm(1.0).item() == 0.0


def test_schedulers_of_torch_change_the_learning_rate_in_place(generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    factored, adam = factored_adam(ours), dense_adam(theirs)
    rates = [group["lr"] for group in factored.param_groups]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
        for optimizer in (factored, adam.adam)
    ]
    for x in make_batches(generator, 6, F64):
        give(theirs, gradients_of(ours, x))
        adam.step()
        factored.zero_grad()
        loss_of(ours, x).backward()
        before = ours.W_enc_T.detach().clone()
        factored.step()
        assert torch.equal(before, ours.W_enc_T) == (rates[0].item() == 0.0)
        for scheduler in schedulers:
            scheduler.step()
        assert [rate.item() for rate in rates] == [adam.adam.param_groups[0]["lr"]] * 2
    assert all(rate is group["lr"] for rate, group in zip(rates, factored.param_groups))
    assert_same_parameters(ours, theirs)


def test_weight_decay_is_that_of_torch(generator: torch.Generator) -> None:
    start = torch.randn(4, 3, generator=generator, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    factored = FactoredAdam([ours], LR, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)
    adam = torch.optim.Adam([theirs], LR, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3, foreach=False)
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=generator, dtype=F64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        factored.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_unit_norm_is_for_matrices() -> None:
    weights, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.full((4,), 5.0))
    optimizer = FactoredAdam([weights, bias], LR, unit_norm=True)
    weights.grad, bias.grad = torch.ones(4, 3), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(bias, torch.full((4,), 5.0 - LR))


def test_a_parameter_that_collects_already_may_be_optimised(generator: torch.Generator) -> None:
    sae = make_sae()
    collect_factors(sae.W_dec)
    loss_of(sae, make_batches(generator, 1)[0]).backward()
    before = sae.W_dec.detach().clone()
    FactoredAdam([sae.W_dec], LR).step()
    assert not torch.equal(sae.W_dec, before)


def test_a_parameter_without_any_gradient_is_passed_over() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = FactoredAdam([parameter], LR, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 3))


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = FactoredAdam([parameter], LR)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert bool((parameter < 1).all())

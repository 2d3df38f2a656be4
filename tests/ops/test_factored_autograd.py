"""Factored gradients within autograd: accumulated, seen by hooks, traced, computed anew, and keeping nothing alive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashsae import backend
from flashsae.ops import FactoredGradient, collect_factors
from flashsae.optim import FactoredAdam
from helpers.twins import F64, LR, MATRICES, D, N, Twins, loss_of, make_sae, make_x, numbers


def test_accumulation_takes_no_more_memory_than_numbers(either_backend: torch.dtype) -> None:
    twins = Twins(either_backend)
    for number in range(16 if either_backend == F64 else 5):  # kernels are slow in the interpreter
        twins.backward(number)
        for name in MATRICES:
            gradient = twins.ours.get_parameter(name).grad
            assert isinstance(gradient, FactoredGradient)
            assert sum(factor.nbytes for factor in gradient.factors or ()) <= N * D * either_backend.itemsize
    twins.assert_same()


def test_hooks_see_the_gradient_and_may_change_it() -> None:
    twins, seen = Twins(), []
    for sae in twins:
        sae.W_dec.register_hook(lambda g: seen.append(g.norm().item()))
        sae.W_enc_T.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        sae.W_dec.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    for number in range(3):
        twins.optimizer.zero_grad()
        twins.adam.zero_grad()
        twins.backward(number)
        twins.step()
    twins.assert_same()
    assert seen[0] > 0
    by_step = torch.tensor(seen, dtype=F64).view(3, 2, 2)  # of ours and theirs, by the hook and after accumulation
    torch.testing.assert_close(by_step[:, 0], by_step[:, 1], rtol=1e-9, atol=0.0)


def test_a_hook_that_keeps_the_gradient_costs_no_numbers() -> None:
    sae, kept = make_sae(), []
    FactoredAdam(sae.parameters(), LR)
    with collect_factors(sae.W_dec):
        sae.W_dec.register_hook(kept.append)
        loss_of(sae, make_x()).backward()
    assert isinstance(sae.W_dec.grad, FactoredGradient)
    assert sae.W_dec.grad.factors
    sae.W_dec.grad.mul_(3)
    torch.testing.assert_close(3 * kept[0], sae.W_dec.grad.materialize())


def test_graphs_that_are_made_to_be_differentiated_give_the_same_gradient() -> None:
    sae = make_sae()
    (ordinary,) = torch.autograd.grad(loss_of(sae, make_x()), sae.W_dec)
    with collect_factors(sae.W_dec, sae.W_enc_T):
        (gradient,) = torch.autograd.grad(loss_of(sae, make_x()), sae.W_dec, create_graph=True)
    torch.testing.assert_close(numbers(gradient), ordinary, rtol=1e-12, atol=0.0)


def test_a_gradient_keeps_no_graph_alive() -> None:
    sae = make_sae()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        loss_of(sae, make_x()).backward()
        sae.decode(sae.encode(make_x())).square().sum().backward()
    for name in MATRICES:
        gradient = sae.get_parameter(name).grad
        assert isinstance(gradient, FactoredGradient)
        for factor in gradient.factors or ():
            assert not any(value.requires_grad for value in vars(factor).values() if isinstance(value, Tensor))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    twins = Twins()
    loss_of(twins.theirs, make_x()).backward()
    checkpoint(loss_of, twins.ours, make_x(), use_reentrant=False).backward()  # type: ignore[no-untyped-call]
    twins.assert_factored()
    twins.assert_same()


def test_functional_calls_get_ordinary_gradients() -> None:
    twins = Twins()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in twins.ours.named_parameters()}
    torch.func.functional_call(twins.ours, parameters, (make_x(),)).square().sum().backward()
    twins.theirs(make_x()).square().sum().backward()
    for name, parameter in twins.theirs.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_module_that_is_converted_takes_its_gradient_along() -> None:
    twins = Twins(torch.float32)
    twins.backward()
    for sae in twins:
        sae.double()
    ours, theirs = twins.ours.W_dec.grad, twins.theirs.W_dec.grad
    assert ours is not None
    assert ours.dtype == F64
    torch.testing.assert_close(numbers(ours), theirs)


def test_what_torch_compile_traces_leaves_ordinary_gradients_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    twins = Twins()
    backend.log_once.cache_clear()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with caplog.at_level("WARNING", "flashsae"):
        compiled(twins.ours, make_x(0)).backward()
        compiled(twins.ours, make_x(1)).backward()
    loss_of(twins.theirs, make_x(0)).backward()
    loss_of(twins.theirs, make_x(1)).backward()
    assert type(twins.ours.W_dec.grad) is Tensor
    twins.assert_same()
    (record,) = caplog.records
    assert "torch.compile traces leave" in record.message

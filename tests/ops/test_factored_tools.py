"""What trainings do with gradients beside stepping: other optimisers, clipping, scaling, forgetting."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE
from flashsae.ops import FactoredGradient
from flashsae.optim import FactoredAdam
from helpers.twins import LR, Twins, loss_of, make_sae, make_x


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_another_adam_meets_ordinary_gradients_while_ours_lives_and_when_it_was_dropped(
    options: dict[str, bool],
) -> None:
    twins = Twins()
    adams = [torch.optim.Adam(sae.parameters(), LR, **options) for sae in twins]  # type: ignore[arg-type]
    for number in range(6):
        for adam in adams:
            adam.zero_grad(set_to_none=number % 2 == 0)
        twins.backward(number)
        for adam in adams:
            adam.step()
        if number == 3:
            assert isinstance(twins.ours.W_dec.grad, FactoredGradient)
            for sae in twins:
                sae.zero_grad()
            del twins.optimizer
            gc.collect()
    twins.assert_same()
    assert type(twins.ours.W_dec.grad) is type(twins.theirs.W_dec.grad) is Tensor


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "LBFGS", "Adadelta", "RAdam"])
def test_every_optimiser_does_what_it_does_with_ordinary_gradients(name: str) -> None:
    twins = Twins()
    twins.backward()
    for sae in twins:
        optimizer = getattr(torch.optim, name)(sae.parameters(), lr=LR)

        def closure(sae: SAE = sae, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = loss_of(sae, make_x())
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    twins.assert_same()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_a_module_forgets_factors(set_to_none: bool) -> None:
    twins = Twins()
    for number in range(4):
        for sae in twins:
            sae.zero_grad(set_to_none=set_to_none)
        twins.backward(number)
        twins.step()
    twins.assert_same()


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
@pytest.mark.parametrize("foreach", [None, False])
def test_clip_grad_norm_of_torch_sees_all_gradients(
    max_norm: float, foreach: bool | None, either_backend: torch.dtype
) -> None:
    twins = Twins(either_backend)
    twins.backward()
    ours, theirs = (nn.utils.clip_grad_norm_(sae.parameters(), max_norm, foreach=foreach).item() for sae in twins)
    assert ours == pytest.approx(theirs, rel=1e-5 if either_backend == torch.float32 else 1e-12)
    twins.assert_factored()
    twins.step()
    twins.assert_same()


@pytest.mark.usefixtures("either_backend")
def test_grad_scaler_unscales_factors() -> None:
    twins = Twins(torch.float32)
    for sae, optimizer in zip(twins, (twins.optimizer, twins.adam)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(sae, make_x(dtype=torch.float32))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
    twins.assert_factored()
    twins.assert_same()


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_grad_scaler_passes_over_a_step_whose_factors_are_not_finite(bad: float) -> None:
    sae = make_sae(torch.float32)
    optimizer = FactoredAdam(sae.parameters(), LR)
    before = sae.W_dec.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(sae, make_x(dtype=torch.float32))).backward()
    assert isinstance(sae.W_dec.grad, FactoredGradient)
    (factor,) = sae.W_dec.grad.factors or ()
    factor.coeffs[2, 1] = bad  # type: ignore[union-attr]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert torch.equal(sae.W_dec, before)

"""When backward passes leave factors: where `collect_factors` asked for them, as long as it did, and nowhere else."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import Tensor

from flashsae import SAE
from flashsae.errors import DtypeError, GradientError, ShapeError
from flashsae.ops import FactoredGradient, collect_factors
from flashsae.optim import FactoredAdam
from helpers.twins import LR, Twins, assert_same_sae, loss_of, make_sae, make_x


def test_a_handle_stops_collecting() -> None:
    sae = make_sae()

    def kind() -> type:
        sae.zero_grad()
        loss_of(sae, make_x()).backward()
        return type(sae.W_dec.grad)

    first, second = collect_factors(sae.W_dec), collect_factors(sae.W_dec, sae.W_enc_T)
    assert kind() is FactoredGradient
    first.stop()
    first.stop()
    assert kind() is FactoredGradient
    second.stop()
    assert kind() is Tensor
    with collect_factors(sae.W_dec):
        assert kind() is FactoredGradient
    assert kind() is Tensor


def test_an_optimiser_that_is_dropped_leaves_nothing_behind() -> None:
    sae = make_sae()
    FactoredAdam(sae.parameters(), LR)
    optimizer = FactoredAdam(sae.parameters(), LR)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    del optimizer
    gc.collect()
    loss_of(sae, make_x()).backward()
    assert type(sae.W_dec.grad) is Tensor


def assert_collects_nothing(copied: SAE, twins: Twins) -> None:
    copied.zero_grad()
    loss_of(copied, make_x()).backward()
    assert type(copied.W_dec.grad) is type(copied.W_enc_T.grad) is Tensor
    assert_same_sae(copied, twins.theirs)


def test_a_deep_copy_of_a_module_collects_nothing() -> None:
    twins = Twins()
    twins.backward()
    assert_collects_nothing(copy.deepcopy(twins.ours), twins)


def test_a_pickle_of_a_module_collects_nothing() -> None:
    twins = Twins()
    twins.backward()
    assert_collects_nothing(pickle.loads(pickle.dumps(twins.ours)), twins)


def test_a_saved_module_collects_nothing() -> None:
    twins, file = Twins(), io.BytesIO()
    twins.backward()
    torch.save(twins.ours, file)
    file.seek(0)
    assert_collects_nothing(torch.load(file, weights_only=False), twins)


def test_gradients_of_other_tensors_leave_none_on_the_matrices() -> None:
    sae, x = make_sae(), make_x().requires_grad_()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        torch.autograd.grad(loss_of(sae, x), x)
    assert sae.W_dec.grad is sae.W_enc_T.grad is None


def test_a_backward_pass_for_some_parameters_leaves_gradients_on_these_alone() -> None:
    sae = make_sae()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        loss_of(sae, make_x()).backward(inputs=[sae.b_dec, sae.W_enc_T])
    assert isinstance(sae.W_enc_T.grad, FactoredGradient)
    assert sae.W_dec.grad is sae.b_enc.grad is None


def test_a_gradient_that_is_returned_is_not_left_on_the_matrix() -> None:
    sae = make_sae()
    with collect_factors(sae.W_dec, sae.W_enc_T):
        (gradient,) = torch.autograd.grad(loss_of(sae, make_x()), sae.W_dec)
    assert isinstance(gradient, FactoredGradient)
    assert sae.W_dec.grad is None
    (ordinary,) = torch.autograd.grad(loss_of(sae, make_x()), sae.W_dec)
    assert torch.equal(gradient.materialize(), ordinary)


def test_a_matrix_that_is_frozen_gets_no_gradient() -> None:
    sae = make_sae()
    sae.W_dec.requires_grad_(False)
    with collect_factors(sae.W_dec):
        loss_of(sae, make_x()).backward()
    assert sae.W_dec.grad is None


def test_only_matrices_that_want_a_gradient_collect() -> None:
    sae = make_sae()
    with pytest.raises(DtypeError, match="parameters: expected a tensor, got SAE"):
        collect_factors(sae.W_enc_T, sae)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="parameters: expected a tensor, got list"):
        collect_factors(sae.W_enc_T, list(sae.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"parameters: expected the shape \[d_sae, d\]"):
        collect_factors(sae.W_enc_T, sae.b_enc)
    with pytest.raises(GradientError, match="parameters: expected leaves"):
        collect_factors(sae.W_enc_T, sae.W_dec.data)
    with pytest.raises(GradientError, match="parameters: expected leaves"):
        collect_factors(sae.W_enc_T, sae.W_dec * 2)
    loss_of(sae, make_x()).backward()
    assert type(sae.W_enc_T.grad) is Tensor

"""A small SAE with two optimisers: ours, and the one that ours must equal."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashsae import SAE, SAEConfig
from flashsae.optim import FactoredAdam
from flashsae.sae import fvu_weights, token_variance
from flashsae.testing import UnitNormAdam, assert_as_accurate

F32, F64 = torch.float32, torch.float64
D, N, K, B, LR = 6, 20, 3, 30, 1e-2


def make_sae(dtype: torch.dtype = F32) -> SAE:
    sae = SAE(SAEConfig(D, N, K), seed=1, dtype=dtype)
    with torch.no_grad():
        sae.b_enc += 0.1
    return sae


def make_batches(generator: torch.Generator, steps: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return [torch.randn(B, D, generator=generator).to(dtype) for _ in range(steps)]


def loss_of(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode_loss(sae.encode(x), x, token_weights=fvu_weights(x, token_variance(x))).loss


def factored_adam(sae: SAE, lr: float = LR, **changes: Any) -> FactoredAdam:
    """Return ours, with rows of the decoder at norm 1."""
    groups = [{"params": [sae.W_dec], "unit_norm": True}, {"params": [sae.W_enc_T, sae.b_enc, sae.b_dec]}]
    return FactoredAdam(groups, lr, **changes)


def dense_adam(sae: SAE) -> UnitNormAdam:
    """Return what people use without ours."""
    return UnitNormAdam(sae.parameters(), sae.W_dec, LR, foreach=False)


def gradients_of(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of an SAE as everybody has them; its own are left alone."""
    twin = copy.deepcopy(sae)
    loss_of(twin, x).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}


def give(sae: SAE, gradients: Mapping[str, Tensor]) -> None:
    """Leave gradients on the parameters, in their dtype."""
    for name, parameter in sae.named_parameters():
        parameter.grad = gradients[name].to(parameter.dtype, copy=True)


def assert_same_parameters(ours: SAE, theirs: SAE) -> None:
    """Assert that two SAEs in float64 are the same."""
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-12, atol=1e-14)


def assert_parameters_as_accurate(ours: SAE, theirs: SAE, exact: SAE) -> None:
    """Assert tier T1 of each parameter."""
    for name, truth in exact.named_parameters():
        mine, peer = ours.get_parameter(name).detach(), theirs.get_parameter(name).detach()
        assert_as_accurate(mine, peer, truth.detach(), name)

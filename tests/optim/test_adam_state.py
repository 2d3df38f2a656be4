"""States of FactoredAdam: saved, loaded in place, refused where they do not fit; and groups that come later."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig
from flashsae.errors import CheckpointError
from flashsae.optim import ADAM_EPS, FactoredAdam
from helpers.adam import (
    F64,
    LR,
    D,
    K,
    N,
    assert_same_parameters,
    factored_adam,
    loss_of,
    make_batches,
    make_sae,
)


def train(sae: SAE, optimizer: FactoredAdam, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        loss_of(sae, x).backward()
        optimizer.step()


@pytest.mark.parametrize("split_weights", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(
    split_weights: bool, state_dtype: torch.dtype, generator: torch.Generator
) -> None:
    kind: dict[str, Any] = {"split_weights": split_weights, "state_dtype": state_dtype}
    batches = make_batches(generator, 8)
    whole = make_sae()
    train(whole, factored_adam(whole, **kind), batches)

    first = make_sae()
    optimizer = factored_adam(first, **kind)
    train(first, optimizer, batches[:4])
    file = io.BytesIO()
    torch.save({"sae": first.state_dict(), "optimizer": optimizer.state_dict()}, file)

    second = make_sae()
    resumed = factored_adam(second, lr=1.0, **kind)  # the learning rate is part of the state
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    second.load_state_dict(saved["sae"])
    resumed.load_state_dict(saved["optimizer"])
    for parameter, other in zip(second.parameters(), first.parameters()):
        for name, tensor in optimizer.state[other].items():
            assert resumed.state[parameter][name].dtype == tensor.dtype, name
            assert torch.equal(resumed.state[parameter][name], tensor), name
    train(second, resumed, batches[4:])
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_loading_a_state_keeps_the_tensors_that_a_captured_graph_reads() -> None:
    sae = make_sae()
    optimizer = factored_adam(sae)
    steps = [optimizer.state[parameter]["step"] for parameter in sae.parameters()]
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"].fill_(0.5)
    for state in saved["state"].values():
        state["step"].fill_(7.0)
    optimizer.load_state_dict(saved)
    assert all(rate is group["lr"] for rate, group in zip(rates, optimizer.param_groups))
    assert all(step is optimizer.state[parameter]["step"] for step, parameter in zip(steps, sae.parameters()))
    assert [tensor.item() for tensor in (*rates, *steps)] == [0.5] * 2 + [7.0] * 4


def test_a_state_of_other_parameters_is_refused_and_nothing_of_it_taken(generator: torch.Generator) -> None:
    sae = make_sae()
    optimizer = factored_adam(sae)
    train(sae, optimizer, make_batches(generator, 2))
    before = copy.deepcopy(optimizer.state_dict())
    of_other_parameters = [
        factored_adam(make_sae(), split_weights=True),
        factored_adam(SAE(SAEConfig(D, N + 1, K))),
        FactoredAdam(make_sae().parameters(), LR),
        FactoredAdam([make_sae().W_dec], LR),
    ]
    for other in of_other_parameters:
        with pytest.raises(CheckpointError, match="the state does not fit this optimiser"):
            optimizer.load_state_dict(other.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, before["state"][number][name]), name


def test_a_state_of_other_moments_is_refused() -> None:
    narrow = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR, state_dtype=torch.bfloat16)
    wide = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR)
    with pytest.raises(CheckpointError, match="the same split_weights and state_dtype"):
        narrow.load_state_dict(wide.state_dict())


def test_a_group_that_is_added_later_is_trained(generator: torch.Generator) -> None:
    ours, theirs = make_sae(F64), make_sae(F64)
    factored = FactoredAdam([ours.W_dec], LR)
    factored.add_param_group({"params": [ours.W_enc_T, ours.b_enc]})
    adam = torch.optim.Adam([theirs.W_dec], LR, eps=ADAM_EPS, foreach=False)
    adam.add_param_group({"params": [theirs.W_enc_T, theirs.b_enc]})
    for x in make_batches(generator, 3, F64):
        for sae, optimizer in ((ours, factored), (theirs, adam)):
            optimizer.zero_grad()
            loss_of(sae, x).backward()
            optimizer.step()
    assert_same_parameters(ours, theirs)

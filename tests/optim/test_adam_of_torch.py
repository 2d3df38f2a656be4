"""FactoredAdam is torch.optim.Adam: every scheduler, and what people do to optimisers, beside torch in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from flashsae.errors import CheckpointError, ConfigError, DtypeError
from flashsae.ops import FactoredGradient
from flashsae.ops.factors import SparseFactor
from flashsae.ops.gradients import collects
from flashsae.optim import FactoredAdam
from helpers.codes import index_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
D, N, K, B, LR = 5, 30, 3, 7, 1e-2
SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


class Twins:
    """One module optimised by FactoredAdam with factors, its twin by torch.optim.Adam with ordinary gradients."""

    def __init__(self, dtype: torch.dtype = F64, **settings: Any) -> None:
        settings = {**SETTINGS, **settings}
        generator = torch.Generator().manual_seed(3)
        start = {
            "weights": torch.randn(N, D, generator=generator, dtype=F64),
            "bias": torch.randn(N, generator=generator),
        }
        self.ours, self.theirs = (
            {name: nn.Parameter(t.to(dtype, copy=True)) for name, t in start.items()} for _ in range(2)
        )
        self.factored = FactoredAdam(self.groups(self.ours), LR, **settings)
        self.adam = torch.optim.Adam(self.groups(self.theirs), LR, foreach=False, **settings)
        self._generator = generator

    @staticmethod
    def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [parameter]} for parameter in parameters.values()]

    def give(self, *names: str) -> None:
        """Leave new gradients on some parameters, and none on the others."""
        indices = torch.rand(B, N, generator=self._generator).topk(K).indices
        coeffs = torch.randn(B, K, generator=self._generator, dtype=F64)
        rows = torch.randn(B, D, generator=self._generator, dtype=F64)
        bias = torch.randn(N, generator=self._generator, dtype=F64)
        for parameters in (self.ours, self.theirs):
            for name, parameter in parameters.items():
                parameter.grad = None
                if name not in (names or parameters):
                    continue
                if name == "bias":
                    parameter.grad = bias.to(parameter.dtype, copy=True)
                    continue
                factor = SparseFactor(index_of(indices, N), coeffs.to(parameter.dtype), rows.to(parameter.dtype))
                gradient = FactoredGradient([factor], parameter)
                parameter.grad = gradient if parameters is self.ours else gradient.materialize()

    def step(self, *names: str, times: int = 1) -> None:
        for _ in range(times):
            self.give(*names)
            self.factored.step()
            self.adam.step()

    def assert_same(self) -> None:
        for name, parameter in self.ours.items():
            digits = {"rtol": 1e-12, "atol": 1e-14} if parameter.dtype == F64 else {"rtol": 2e-5, "atol": 1e-6}
            torch.testing.assert_close(parameter.detach(), self.theirs[name].detach(), **digits)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.05, total_steps=12),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.LinearLR(o, total_iters=4)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    there = {name for name in schedulers.__all__ if name not in ("LRScheduler",)}
    assert there <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    twins = Twins()
    pair = [SCHEDULERS[name](optimizer) for optimizer in (twins.factored, twins.adam)]
    for number in range(9):
        twins.step()
        for scheduler in pair:
            scheduler.step(*([1.0 + number] if name == "ReduceLROnPlateau" else []))
        for ours, theirs in zip(twins.factored.param_groups, twins.adam.param_groups):
            assert float(ours["lr"]) == pytest.approx(float(theirs["lr"]), rel=1e-12)
            assert ours["betas"] == theirs["betas"]
    twins.assert_same()


def test_settings_that_are_changed_by_hand_are_read_at_the_next_step() -> None:
    twins = Twins()
    changes: list[dict[str, Any]] = [
        {"lr": 1e-4}, {"betas": (0.5, 0.6)}, {"eps": 1e-2}, {"weight_decay": 0.7},
        {"lr": torch.tensor(0.05, dtype=F64)},
        {"lr": 0.0}, {"decoupled_weight_decay": True}, {"lr": 3e-3, "betas": (0.0, 0.9)},
    ]  # fmt: skip
    for change in changes:
        twins.step(times=2)
        for optimizer in (twins.factored, twins.adam):
            optimizer.param_groups[0].update(change)
    twins.step(times=2)
    twins.assert_same()


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled: bool) -> None:
    twins = Twins(decoupled_weight_decay=decoupled)
    twins.step(times=8)
    twins.assert_same()


def test_steps_are_counted_a_parameter() -> None:
    twins = Twins()
    for number in range(20):
        twins.step(*(["bias"] if number % 7 == 0 else []))
    twins.assert_same()
    assert [twins.factored.state[p]["step"].item() for p in twins.ours.values()] == [17.0, 20.0]


def _saved(twins: Twins) -> None:
    file = io.BytesIO()
    torch.save((twins.ours, twins.factored), file)
    file.seek(0)
    twins.ours, twins.factored = torch.load(file, weights_only=False)


def _pickled(twins: Twins) -> None:
    twins.ours, twins.factored = pickle.loads(pickle.dumps((twins.ours, twins.factored)))


def _deepcopied(twins: Twins) -> None:
    twins.ours, twins.factored = copy.deepcopy((twins.ours, twins.factored))


@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved])
@pytest.mark.parametrize("steps_before", [0, 4])
def test_copies_go_on_alike(copied: Callable[[Twins], None], steps_before: int) -> None:
    twins = Twins()
    twins.step(times=steps_before)
    copied(twins)
    twins.step(times=4)
    twins.assert_same()
    assert collects(twins.ours["weights"])


def test_a_copy_leaves_the_original_alone() -> None:
    twins = Twins()
    twins.step(times=3)
    other = copy.deepcopy((twins.ours, twins.factored))
    other[0]["weights"].grad = torch.ones(N, D, dtype=F64)
    other[1].step()
    twins.step(times=3)
    twins.assert_same()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_state_of_torch_adam_is_taken_over(dtype: torch.dtype) -> None:
    twins = Twins(dtype)
    twins.step(times=3)
    weights = [parameter.detach().clone() for parameter in twins.theirs.values()]
    state = copy.deepcopy(twins.adam.state_dict())
    fresh = Twins(dtype)
    fresh.factored.load_state_dict(state)
    fresh.adam.load_state_dict(state)
    with torch.no_grad():
        for parameters in (fresh.ours, fresh.theirs):
            for parameter, value in zip(parameters.values(), weights):
                parameter.copy_(value)
    fresh.step(times=3)
    fresh.assert_same()
    for group in state["param_groups"]:
        group["amsgrad"] = True
    with pytest.raises(CheckpointError, match="the state does not fit"):
        fresh.factored.load_state_dict(state)


def test_hooks_of_loading_are_called() -> None:
    twins, heard = Twins(), []
    twins.factored.register_load_state_dict_pre_hook(lambda optimizer, state: heard.append("before"))
    twins.factored.register_load_state_dict_post_hook(lambda optimizer: heard.append("after"))
    twins.factored.load_state_dict(twins.factored.state_dict())
    assert heard == ["before", "after"]


def test_empty_groups_are_passed_over() -> None:
    weights = nn.Parameter(torch.ones(4, 3))
    optimizer = FactoredAdam([{"params": []}, {"params": [weights]}], LR)
    weights.grad = torch.ones(4, 3)
    optimizer.step()
    assert bool((weights < 1).all())
    assert optimizer.clip_grad_norm(1.0).item() == pytest.approx(12**0.5)


@pytest.mark.parametrize("after", [0, 3])
def test_a_module_may_be_converted_afterwards(after: int) -> None:
    twins = Twins(F32)
    twins.step(times=after)
    for parameter in (*twins.ours.values(), *twins.theirs.values()):
        parameter.data, parameter.grad = parameter.data.double(), None
    for state in twins.adam.state.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
    twins.step(times=3)
    for name, parameter in twins.ours.items():
        assert parameter.dtype == F64
        torch.testing.assert_close(parameter, twins.theirs[name], rtol=1e-6, atol=1e-8)


def _split() -> tuple[nn.Linear, FactoredAdam]:
    module = nn.Linear(D, N, bias=False)
    optimizer = FactoredAdam(module.parameters(), LR, split_weights=True)
    for _ in range(3):
        module.weight.grad = torch.randn(N, D).to(BF16)
        optimizer.step()
    return module, optimizer


def test_weights_that_are_loaded_into_a_module_have_no_stale_low_halves() -> None:
    module, optimizer = _split()
    loaded = {"weight": torch.randn(N, D)}
    assert optimizer.state[module.weight]["low"].any()
    module.load_state_dict(loaded)
    assert torch.equal(optimizer.float32_weights(module.weight), loaded["weight"].to(BF16).float())
    module.weight.grad = torch.zeros(N, D, dtype=module.weight.dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.float32_weights(module.weight), loaded["weight"].to(BF16).float())


@pytest.mark.parametrize("weights_first", [True, False])
def test_weights_and_state_that_are_loaded_together_keep_every_bit(weights_first: bool) -> None:
    module, optimizer = _split()
    whole = optimizer.float32_weights(module.weight)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    other, resumed = _split()
    if weights_first:
        other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if not weights_first:
        other.load_state_dict(saved[0])
    assert torch.equal(resumed.float32_weights(other.weight), whole)
    resumed.zero_grad()
    resumed.step()  # without a gradient
    assert torch.equal(resumed.float32_weights(other.weight), whole)


def test_split_weights_that_were_converted_are_refused() -> None:
    module, optimizer = _split()
    module.float()
    module.weight.grad = torch.zeros(N, D, dtype=module.weight.dtype)
    with pytest.raises(DtypeError, match=r"split weights: expected torch\.bfloat16 parameters, got torch\.float32"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(N, D, sparse=True)
    optimizer = FactoredAdam(embedding.parameters(), LR)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DtypeError, match="sparse tensor"):
        optimizer.step()


def test_a_graph_that_needs_the_old_weights_notices_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    weights = nn.Parameter(torch.randn(4, 3, device="cuda" if torch.cuda.is_available() else "cpu"))
    loss = (weights**2).sum()
    optimizer = FactoredAdam([weights], LR)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_biases_of_any_shape_are_optimised() -> None:
    for shape in ((), (3, 4, 5)):
        ours, theirs = (nn.Parameter(torch.ones(shape, dtype=F64)) for _ in range(2))
        optimizers = [FactoredAdam([ours], LR), torch.optim.Adam([theirs], LR, eps=6.25e-10)]
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = torch.full(shape, 0.3, dtype=F64)
            optimizer.step()
        torch.testing.assert_close(ours, theirs)


def test_a_learning_rate_may_be_a_tensor() -> None:
    weights = nn.Parameter(torch.ones(2, 2))
    optimizer = FactoredAdam([weights], torch.tensor(0.5))
    weights.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.full((2, 2), 0.5))


def test_a_learning_rate_that_comes_as_a_tensor_stays_its_owners() -> None:
    lr = torch.tensor(1e-2, dtype=F64)
    twins = Twins()
    twins.factored = FactoredAdam(Twins.groups(twins.ours), lr, **SETTINGS)
    twins.adam = torch.optim.Adam(Twins.groups(twins.theirs), lr, foreach=False, **SETTINGS)
    twins.step(times=2)
    lr.mul_(0.1)
    twins.step(times=2)
    twins.assert_same()


@pytest.mark.parametrize("how", ["clear", "one", "replaced"])
def test_a_state_that_was_taken_away_begins_anew(how: str) -> None:
    twins = Twins()
    twins.step(times=3)
    for optimizer in (twins.factored, twins.adam):
        if how == "clear":
            optimizer.state.clear()
        elif how == "one":
            optimizer.state[optimizer.param_groups[0]["params"][0]] = {}
        else:
            optimizer.state = defaultdict(dict)
    twins.step(times=3)
    twins.assert_same()


def test_parameters_may_be_put_into_a_group_by_hand() -> None:
    twins = Twins()
    twins.factored, twins.adam = (
        FactoredAdam([twins.ours["bias"]], LR),
        torch.optim.Adam([twins.theirs["bias"]], LR, eps=6.25e-10, foreach=False),
    )
    twins.step()
    twins.factored.param_groups[0]["params"].append(twins.ours["weights"])
    twins.adam.param_groups[0]["params"].append(twins.theirs["weights"])
    twins.step(times=3)
    twins.assert_same()


def test_an_optimiser_may_be_built_and_stepped_in_inference_mode() -> None:
    twins = Twins()
    with torch.inference_mode():
        twins.factored = FactoredAdam(Twins.groups(twins.ours), LR, **SETTINGS)
        twins.factored.param_groups[0]["lr"] = LR
    twins.give()
    with torch.inference_mode():
        twins.factored.step()
    twins.adam.step()
    twins.step(times=2)
    twins.assert_same()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"maximize": True}, "maximize: FactoredAdam has no such form"),
    ({"amsgrad": True}, "amsgrad: FactoredAdam has no such form"),
    ({"betas": (0.9,)}, "betas: expected numbers, and two of them"),
    ({"betas": 0.9}, "betas: expected numbers, and two of them"),
    ({"lr": "a"}, "expected numbers, and two of them as betas, got 'a'"),
    ({"lr": None}, "expected numbers"),
    ({"lr": float("inf")}, "expected numbers that are not negative"),
    ({"lr": torch.ones(3)}, "expected numbers"),
    ({"eps": None}, "expected numbers"),
    ({"unit_norm": "no"}, "unit_norm: expected True or False, got 'no'"),
    ({"split_weights": 1}, "split_weights: expected True or False, got 1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_mean_nothing_are_refused_and_leave_nothing_behind(
    settings: dict[str, Any], message: str
) -> None:
    first, second = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    with pytest.raises(ConfigError, match=message):
        FactoredAdam([{"params": [first], "split_weights": True}, {"params": [second], **settings}], LR)
    assert first.dtype == F32
    optimizer = FactoredAdam([first], LR)
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [second], **settings})
    assert len(optimizer.param_groups) == 1
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    saved["param_groups"][0].update(settings)
    saved["state"][0]["exp_avg"] += 1
    with pytest.raises((ConfigError, CheckpointError)):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[first]["exp_avg"], before["state"][0]["exp_avg"])


@pytest.mark.parametrize("state", [{}, {"state": {}}, torch.optim.SGD([torch.zeros(4, 3)], 0.1).state_dict()])
def test_states_of_something_else_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the state does not fit this optimiser"):
        FactoredAdam([nn.Parameter(torch.ones(4, 3))], LR).load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_made_after_somebody_wrote_to_split_weights_have_no_stale_halves(copied: Callable[[Any], Any]) -> None:
    module, optimizer = _split()
    new = torch.randn(N, D)
    with torch.no_grad():
        module.weight.copy_(new)
    twin, other = copied((module, optimizer))
    assert torch.equal(other.float32_weights(twin.weight), new.to(BF16).float())
    module.weight.data = torch.randn(N, D).to(BF16)
    assert torch.equal(optimizer.float32_weights(module.weight), module.weight.float())


def test_a_gradient_that_is_refused_counts_no_step() -> None:
    embedding = nn.Embedding(N, D, sparse=True)
    optimizer = FactoredAdam(embedding.parameters(), LR)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(DtypeError):
        optimizer.step()
    assert optimizer.state[embedding.weight]["step"].item() == 0.0

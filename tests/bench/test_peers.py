from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from flashsae.bench import peers
from flashsae.bench.dense import dense_pytorch
from flashsae.bench.peers import LIBRARIES, PYTORCH
from flashsae.bench.problem import dense_squared_error, make_problem
from flashsae.bench.setups import Shape
from flashsae.errors import MissingExtraError

PROBLEM = make_problem(Shape("x", 64, 12, 100, 5), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16", "tf32", "float32"])
def test_dense_steps_fall_and_keep_the_decoder_at_unit_norm(precision: str) -> None:
    before = [weight.clone() for weight in PROBLEM.weights]
    step, x = dense_pytorch(PROBLEM, precision), PROBLEM.xs[0]
    losses = [float(step.run(x)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert step.squared_error(losses[0], x) == pytest.approx(dense_squared_error(PROBLEM), rel=0.02)
    torch.testing.assert_close(step.state[2].norm(dim=1), torch.ones(100))
    assert all(weight.grad is None for weight in step.state)
    assert all(torch.equal(a, b) for a, b in zip(before, PROBLEM.weights))  # others start from them


def test_a_library_that_is_missing_is_known_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in LIBRARIES:
        monkeypatch.setitem(sys.modules, peer.module, None)
        assert not peer.is_installed
        with pytest.raises(MissingExtraError, match=r"flashsae\[peers\]"):
            peer.build(PROBLEM)
    assert PYTORCH.is_installed


class FakeCoder(nn.Module):
    """What the recipe asks of a SparseCoder; notes in which order."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, d_in: int, config: SimpleNamespace, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_in, config.num_latents, device=device, dtype=dtype)
        self.W_dec = nn.Parameter(torch.empty(config.num_latents, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in))

    def forward(self, x: Tensor) -> SimpleNamespace:
        x_hat = self.encoder(x).relu() @ self.W_dec + self.b_dec
        return SimpleNamespace(fvu=(x_hat - x).square().sum() / (x - x.mean(0)).square().sum())

    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        assert self.W_dec.grad is not None
        self.calls.append("project")
        self.before = self.W_dec.detach().clone()

    def set_decoder_norm_to_unit_norm(self) -> None:
        assert not torch.equal(self.W_dec, self.before)  # Adam came between
        self.calls.append("normalize")


def test_a_recipe_goes_through_the_public_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sparsify")
    module.SparseCoder, module.SparseCoderConfig = FakeCoder, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsify", module)
    FakeCoder.calls.clear()
    step = peers.sparsify(PROBLEM)
    loss = float(step.run(PROBLEM.xs[0]))
    assert FakeCoder.calls == ["project", "normalize"]
    assert step.squared_error(loss, PROBLEM.xs[0]) > 0
    assert all(weight.grad is None for weight in step.state)

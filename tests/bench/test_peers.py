from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae.architecture import architecture_names
from flashsae.bench import dictionaries, lens, peers
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


class FakeTrainingSAE(nn.Module):
    """What the recipe asks of a training SAE of SAELens: a loss with a penalty beside the error."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        sizes = {"W_enc": (config.d_in, config.d_sae), "W_dec": (config.d_sae, config.d_in), "b_dec": (config.d_in,)}
        for name, size in (sizes | {"b_enc": (config.d_sae,), "threshold": (config.d_sae,)}).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def training_forward_pass(self, given: SimpleNamespace) -> SimpleNamespace:
        z = (given.sae_in - self.b_dec) @ self.W_enc + self.b_enc
        x_hat = (z * (z > self.threshold)) @ self.W_dec + self.b_dec
        error = (x_hat - given.sae_in).float().square().sum(1).mean()
        return SimpleNamespace(losses={"mse_loss": error, "l0_loss": 100 * given.coefficients["l0"]}, loss=error + 100)


def test_a_training_sae_has_the_thresholds_of_the_problem_and_tells_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = ModuleType("jumprelu_sae"), ModuleType("sae")
    module.JumpReLUTrainingSAE, module.JumpReLUTrainingSAEConfig = FakeTrainingSAE, SimpleNamespace  # type: ignore[attr-defined]
    inputs.TrainStepInput = SimpleNamespace  # type: ignore[attr-defined]
    fakes = {"sae_lens": ModuleType("sae_lens"), "sae_lens.saes": ModuleType("saes"), "sae_lens.saes.sae": inputs}
    for name, fake in (fakes | {"sae_lens.saes.jumprelu_sae": module}).items():
        monkeypatch.setitem(sys.modules, name, fake)
    problem = make_problem(PROBLEM.shape, torch.float32, torch.device("cpu"), arch="jump_relu")
    step = lens.sae_lens(problem)
    error = step.squared_error(float(step.run(problem.xs[0])), problem.xs[0])
    assert error == pytest.approx(dense_squared_error(problem), rel=0.02)


class FakeTrainer:
    """What the recipe asks of a trainer of dictionary_learning."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        width, d_sae = settings["activation_dim"], settings["dict_size"]
        self.ae = SimpleNamespace(
            W_enc=torch.zeros(width, d_sae), b_enc=torch.zeros(d_sae), W_dec=nn.Parameter(torch.zeros(d_sae, width)),
            b_dec=torch.zeros(width), parameters=lambda: [self.ae.W_dec], buffers=lambda: [],
        )  # fmt: skip
        self.optimizer = torch.optim.Adam([self.ae.W_dec])

    def loss(self, x: Tensor, step: int) -> Tensor:
        ends = torch.tensor(self.settings["group_fractions"]).cumsum(0) * len(self.ae.W_dec)
        z = ((x - self.ae.b_dec) @ self.ae.W_enc + self.ae.b_enc).relu().flatten()
        code = torch.zeros_like(z)
        top = z.topk(len(x) * self.settings["k"])
        code = code.scatter(0, top.indices, top.values).view(len(x), -1)
        x_hats = [code[:, : round(float(end))] @ self.ae.W_dec[: round(float(end))] + self.ae.b_dec for end in ends]
        errors = torch.stack([(x - x_hat).square().sum(1).mean() for x_hat in x_hats])
        return errors.mean() / len(ends)


def test_a_trainer_keeps_the_decoder_at_unit_norm_and_divides_nested_errors_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, common = ModuleType("matryoshka_batch_top_k"), ModuleType("trainer")
    module.MatryoshkaBatchTopKTrainer = FakeTrainer  # type: ignore[attr-defined]
    common.remove_gradient_parallel_to_decoder_directions = lambda W, grad, *sizes: grad  # type: ignore[attr-defined]
    common.set_decoder_norm_to_unit_norm = lambda W, *sizes: W / W.norm(dim=0)  # type: ignore[attr-defined]
    names = ("dictionary_learning", "dictionary_learning.trainers")
    fakes = {name: ModuleType(name) for name in names}
    fakes |= {f"{names[1]}.matryoshka_batch_top_k": module, f"{names[1]}.trainer": common}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    problem = make_problem(PROBLEM.shape, torch.float32, torch.device("cpu"), arch="matryoshka")
    step = dictionaries.dictionary_learning(problem)
    error = step.squared_error(float(step.run(problem.xs[0])), problem.xs[0])
    assert error == pytest.approx(dense_squared_error(problem), rel=0.03)
    torch.testing.assert_close(step.state[0].norm(dim=1), torch.ones(100))
    assert step.state[0].grad is None


def test_libraries_train_architectures_that_there_are() -> None:
    assert {arch for peer in LIBRARIES for arch in peer.archs} <= set(architecture_names(installed=False))

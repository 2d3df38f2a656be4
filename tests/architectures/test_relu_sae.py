from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, ReLUSettings, SAEConfig, TrainConfig
from flashsae.architecture import Progress
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError
from flashsae.ops import Capacity
from flashsae.sae import fvu_weights
from flashsae.sae.step import Step
from flashsae.testing import DenseTrainer, assert_as_accurate, integer_inputs, oracle
from flashsae.train import init_state, train_step
from flashsae.train import room as train_room
from flashsae.train.room import Room
from helpers.on_both import DEVICE
from helpers.real import activations
from helpers.resumed import same_after_a_kill

D_IN, D_SAE, VARIANCE, L1 = 6, 20, 4.0, 0.125
Found = dict[str, Tensor]


@pytest.fixture(params=["reference", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the reference and on the kernels; where their tensors are to lie."""
    monkeypatch.setenv("FLASHSAE_BACKEND", request.param)
    if request.param == "reference":
        return "cpu"
    pytest.importorskip("triton")
    return DEVICE


def sae_of(kind: str, generator: torch.Generator, *, integer: bool, **settings: float) -> SAE:
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=ReLUSettings(l1=L1, **settings)), seed=3)
    with torch.no_grad():
        if integer:
            sae.W_dec.copy_(torch.eye(D_IN)[torch.randint(0, D_IN, (D_SAE,), generator=generator)])
            sae.W_enc_T.copy_(integer_inputs(D_SAE, D_IN, generator=generator, largest=1))
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(integer_inputs(len(bias), generator=generator, largest=1))
        sae.b_enc += {"some": -1, "all dead": -100, "all alive": 100}[kind]
    sae.set_progress(Progress(3, 4, 0))
    return sae


def ours(sae: SAE, x: Tensor, capacity: Capacity) -> Found:
    sae.capacity = capacity
    x = x.detach().requires_grad_()
    code = sae.encode(x)
    step = Step(sae, x, x, code, fvu_weights(x.detach(), VARIANCE))
    loss, terms = step.total(TrainConfig(auxk_alpha=0.0))
    wanted = {"x": x, **dict(sae.named_parameters())}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"latent_acts": code.to_dense().detach(), **terms, **dict(zip(wanted, grads))}


def dense(sae: SAE, x: Tensor, dtype: torch.dtype) -> Found:
    p = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in sae.named_parameters()}
    x = x.to(dtype).requires_grad_()
    now = {name: value.to(dtype) for name, value in sae.now.items()}
    terms = oracle("relu").losses(x, p, VARIANCE, **now)
    loss = terms["fvu"] + L1 * terms["sparsity"]
    wanted = {"x": x, **p}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    latent_acts = oracle("relu")(x, p).detach()
    return {"latent_acts": latent_acts, **{n: t.detach() for n, t in terms.items()}, **dict(zip(wanted, grads))}


def tokens(B: int, generator: torch.Generator) -> Tensor:
    x = integer_inputs(B, D_IN, generator=generator, largest=2)
    x[1::4] *= 0  # tokens with few latents, or none
    return x


CAPACITIES: list[Capacity] = ["any", "full", 8 * D_SAE + 3]


@pytest.mark.parametrize("kind", ["some", "all dead", "all alive"])
def test_t0_loss_and_gradients_are_those_of_the_oracle(kind: str, device: str, generator: torch.Generator) -> None:
    sae, x = sae_of(kind, generator, integer=True), tokens(8, generator)
    exact = dense(sae, x, torch.float64)
    assert bool((exact["latent_acts"] > 0).any()) == (kind != "all dead")
    for capacity in CAPACITIES:
        found = ours(sae.to(device), x.to(device), capacity)
        for name, expected in exact.items():
            assert torch.equal(found[name].cpu().double(), expected), (capacity, name)


def biases_joined(found: Found) -> Found:
    """Return the gradients of both biases as one: of few numbers PyTorch's error may be nothing by chance."""
    rest = {name: tensor for name, tensor in found.items() if not name.startswith("b_")}
    return {**rest, "biases": torch.cat([found["b_enc"], found["b_dec"]])}


@pytest.mark.parametrize("p_end", [1.0, 0.2])
def test_t1_and_t3_as_accurate_as_the_oracle_and_repeatable(
    p_end: float, device: str, generator: torch.Generator
) -> None:
    sae, x = sae_of("some", generator, integer=False, p_end=p_end), torch.randn(9, D_IN, generator=generator)
    theirs, exact = (biases_joined(dense(sae, x, dtype)) for dtype in (torch.float32, torch.float64))
    for capacity in ("full", 9 * D_SAE):
        found, again = (biases_joined(ours(sae.to(device), x.to(device), capacity)) for _ in range(2))
        for name in exact:
            assert torch.equal(found[name], again[name]), name
            assert_as_accurate(found[name].cpu(), theirs[name], exact[name], f"{capacity}: {name}")


def test_the_loss_of_a_decoder_whose_rows_have_norms_is_that_of_unit_rows(generator: torch.Generator) -> None:
    """Rows of norm 1 lose no function, and the penalty by norms is the same for all that are one function."""
    sae, x = sae_of("some", generator, integer=False), torch.randn(9, D_IN, generator=generator)
    p = dict(sae.named_parameters())
    norms = torch.rand(D_SAE, generator=generator) + 0.5
    scaled = {**p, "W_dec": p["W_dec"] * norms[:, None], "W_enc_T": p["W_enc_T"] / norms[:, None]}
    scaled["b_enc"] = p["b_enc"] / norms
    for name, term in oracle("relu").losses(x, scaled, VARIANCE, ramp=1.0).items():
        torch.testing.assert_close(term, oracle("relu").losses(x, p, VARIANCE, ramp=1.0)[name])


def test_the_slope_of_the_p_norm_is_finite_and_steeper_for_what_is_small() -> None:
    config = SAEConfig(2, 4, arch=ReLUSettings(p_end=0.2, p_start=0.0, l1_warmup=0.0))
    sae = SAE(config)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.eye(2).repeat(2, 1))
        sae.b_enc.copy_(torch.tensor([1e-30, 0.0, -2.0, 1.0]))
    x = torch.zeros(1, 2)
    step = Step(sae, x, x, sae.encode(x), fvu_weights(x, 1.0))
    term = sae.architecture.terms[1].compute(step)
    assert term is not None
    assert float(term.detach()) == pytest.approx(1.0)
    (grad,) = torch.autograd.grad(term, sae.b_enc)
    assert bool(grad.isfinite().all())
    assert grad[1] == grad[2] == 0
    assert 50 < grad[0] / grad[3] < 1000


def test_what_is_scheduled() -> None:
    config = SAEConfig(2, 4, arch=ReLUSettings(p_end=0.2, p_start=0.5, l1_warmup=0.1))
    at = {step: config.architecture.schedule(config, Progress(step, 100, 0)) for step in (0, 5, 10, 50, 75)}  # type: ignore[misc]
    assert [at[step]["ramp"] for step in (0, 5, 10, 75)] == [0.0, 0.5, 1.0, 1.0]
    assert [at[step]["p"] for step in (0, 50, 75)] == pytest.approx([1.0, 1.0, 0.6])
    assert SAE(config).now["p"].item() == pytest.approx(0.2)
    plain = SAE(SAEConfig(2, 4, arch=ReLUSettings()))
    assert {name: value.item() for name, value in plain.now.items()} == {"ramp": 1.0}
    late = SAEConfig(2, 4, arch=ReLUSettings(p_end=0.2, p_start=1.0))
    assert config.architecture.schedule is not None
    assert config.architecture.schedule(late, Progress(99, 100, 0))["p"] == 1.0


@pytest.mark.parametrize(
    ("name", "value"), [("l1", -1.0), ("p_end", 0.0), ("p_end", 1.5), ("p_start", 2.0), ("l1_warmup", -0.1)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        ReLUSettings(**{name: value})


def test_a_short_training_explains_activations_of_a_language_model() -> None:
    x, held_out = activations()
    config = TrainConfig(d_sae=256, batch_tokens=128)
    sae = flashsae.fit(x, arch=ReLUSettings(l1=0.1), tokens=128 * 60, config=config, progress=False)
    result = flashsae.evaluate(sae, held_out)
    assert 0.2 < result.fvu < 0.5
    assert 15 < result.l0 < 60


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1500, 12, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(batch_tokens=128, checkpoint_every_steps=10)
    arch = ReLUSettings(p_end=0.5, p_start=0.2)
    same_after_a_kill(tmp_path, monkeypatch, x=x, d_sae=48, arch=arch, tokens=128 * 35, config=config)


@pytest.mark.parametrize("room", [False, True], ids=["by its count", "with room"])
def test_t4_the_step_is_that_of_a_dense_sae_with_plain_adam(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From dense codes to sparse ones: naive autograd, same data and start."""
    monkeypatch.setattr(train_room, "PERIOD", 8)
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0.3")
    x = SuperpositionModel(16, 40, active=3.0).sample(2000, seed=1)
    arch = ReLUSettings(l1=0.5, p_end=0.5, p_start=0.3)
    config = TrainConfig(d_sae=64, arch=arch, tokens=64 * 80, batch_tokens=64, lr=1e-2).resolve(16)
    state, twin = (init_state(config, RowShuffle(ArraySource(x), 64, seed=0), torch.device("cpu")) for _ in range(2))
    state.room = Room() if room else None
    settings = {"architecture": "relu", **asdict(arch)}
    dense, kinds = DenseTrainer(dict(state.sae.named_parameters()), config.lr, state.variance, **settings), []
    for _ in range(80):
        ours = train_step(state, state.batches.next_batch(), config)["loss"].item()
        kinds.append(state.sae.encode(x[:64] * state.scale).pattern.is_full)
        rate = float(state.optimizer.param_groups[0]["lr"])
        now = {name: float(value) for name, value in state.sae.now.items()}
        assert ours == pytest.approx(
            dense.step(twin.batches.next_batch()["x"] * state.scale, rate, **now).item(), rel=1e-3
        )
    assert kinds[0]
    assert not kinds[-1]

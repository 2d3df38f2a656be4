"""SAEs that learn which latents are active, on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import flashsae
from flashsae import GatedSettings, JumpReLUSettings, TrainConfig
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.sae import exceeds, jump_relu
from flashsae.testing import assert_as_accurate
from flashsae.train import init_state, train_step
from flashsae.train.graph import CapturedSteps
from helpers.on_both import as_float64
from helpers.resumed import same_after_a_kill
from helpers.sae_steps import dense_step, our_step, parameters_of
from helpers.steps import Tensors

pytestmark = pytest.mark.gpu

STEPS = 40
X = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1)
FORMS: dict[str, Any] = {
    "quadratic": JumpReLUSettings(target_l0=8.0, bandwidth=0.3, frequency_weight=0.1, sparsity_weight=0.1),
    "l0": JumpReLUSettings(target_l0=8.0, penalty="l0", bandwidth=0.3, ste_to_input=True),
    "tanh": JumpReLUSettings(target_l0=8.0, penalty="tanh", bandwidth=0.3, sparsity_weight=0.1),
    "gated": GatedSettings(l1=0.3),
}


def inputs_of(arch: object, *, integer: bool, B: int, n: int, generator: torch.Generator) -> Tensors:
    found = parameters_of(arch, B, 64, n, generator, integer=integer, dtype=torch.float32)
    if "threshold" in found:
        found["threshold"] = found["threshold"].abs() + (1.0 if integer else 16.0)
    if "r_mag" in found:
        found["r_mag"] *= 0.0 if integer else 0.1
        found["b_enc"] -= 0.0 if integer else 16.0
    return {name: tensor.to("cuda") for name, tensor in found.items()}


@pytest.mark.parametrize("room", [None, "full", 300 * 1500])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_as_accurate_as_dense_pytorch_and_repeats(
    form: str, room: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    arch, inputs = FORMS[form], inputs_of(FORMS[form], integer=False, B=300, n=1500, generator=generator)
    numbers = {} if form == "gated" else {"unit": 2.0}
    ours, again = (our_step(arch, inputs, room, **numbers) for _ in range(2))
    peer, exact = dense_step(arch, inputs, **numbers), dense_step(arch, as_float64(inputs), **numbers)
    for name, truth in exact.items():
        assert torch.equal(ours[name], again[name]), name
        assert_as_accurate(ours[name], peer[name], truth, name)


@pytest.mark.parametrize("room", [None, "full", 256 * 600])
@pytest.mark.parametrize("form", ["quadratic", "l0", "gated"])
def test_a_step_of_integers_is_bitwise_the_dense_one(form: str, room: Any, generator: torch.Generator) -> None:
    arch: Any = GatedSettings(l1=0.5)
    if form != "gated":
        penalty: dict[str, Any] = {"penalty": form, "sparsity_weight": 0.5, "frequency_weight": 0.25}
        arch = JumpReLUSettings(target_l0=4.0, bandwidth=4.0, frequency_scale=0.125, **penalty)
    inputs = inputs_of(arch, integer=True, B=256, n=600, generator=generator)
    for name in ("W_enc_T", "W_dec"):
        inputs[name] *= (torch.rand(600, 64, generator=generator) < 0.1).to("cuda")  # so that sums stay small
    ours, exact = our_step(arch, inputs, room), dense_step(arch, as_float64(inputs))
    for name, truth in exact.items():
        if torch.equal(truth.float().double(), truth):
            assert torch.equal(ours[name].double(), truth), name
    assert sum(torch.equal(truth.float().double(), truth) for truth in exact.values()) >= 8


def test_ties_and_nan_are_as_on_the_cpu() -> None:
    def run(device: str) -> list[Tensor]:
        z = torch.tensor([0.5, 1.75, 2.0, 2.25, 2.5, torch.nan, -torch.inf, torch.inf], device=device).requires_grad_()
        threshold = torch.full((8,), 2.0, device=device, requires_grad=True)
        bandwidth = torch.tensor(1.0, device=device)
        found = jump_relu(z, threshold, bandwidth), exceeds(z, threshold, bandwidth)
        upstream = torch.arange(8.0, device=device)
        grads = torch.autograd.grad(found, [z, threshold], [upstream, upstream])
        return [tensor.detach().cpu() for tensor in (*found, *grads)]

    for ours, theirs in zip(run("cuda"), run("cpu")):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


class Eager(CapturedSteps):
    """Steps of which none is of the kind of the one before."""

    def in_parts(self, step: Any, batch: Any, kind: Any, goes_on: Any = None) -> Any:
        return super().in_parts(step, batch, (kind, object()), goes_on)


TRAINED: dict[str, Any] = {
    "quadratic": JumpReLUSettings(target_l0=6.0, frequency_weight=0.1, pre_act_weight=0.1),
    "dense start": JumpReLUSettings(target_l0=6.0, initial_threshold=0.001, sparsity_warmup=0.3),
    "tanh": JumpReLUSettings(target_l0=6.0, penalty="tanh", sparsity_weight=0.01, pre_act_weight=0.1),
    "gated": GatedSettings(l1=0.5, l1_warmup=0.2),
}


def config_of(form: str, precision: Any, steps: int = STEPS) -> TrainConfig:
    return TrainConfig(
        d_sae=512, arch=TRAINED[form], tokens=512 * steps, batch_tokens=512, precision=precision, lr=3e-3,
        auxk_alpha=1 / 32, dead_after_tokens=2048, device="cuda",
    ).resolve(64)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("form", TRAINED)
def test_captured_steps_are_bitwise_eager_ones(form: str, precision: str) -> None:
    config, found = config_of(form, precision), []
    for eager in (False, True):
        state = init_state(config, RowShuffle(ArraySource(X), 512, seed=0), torch.device("cuda"))
        if eager:
            state.captured = Eager()
        losses = []
        for _ in range(STEPS):
            batch = {site: acts.to("cuda") for site, acts in state.batches.next_batch().items()}
            losses.append(train_step(state, batch, config)["loss"].clone())
        found.append((torch.stack(losses), {name: value.clone() for name, value in state.sae.state_dict().items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert bool(found[0][0].isfinite().all())
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_the_target_is_reached() -> None:
    model = SuperpositionModel(64, 128, active=4.0)
    x, held_out = model.sample(200_000, seed=1), model.sample(20_000, seed=2)  # each comes once
    sae = flashsae.fit(x, config=config_of("quadratic", "bf16", 390), progress=False)
    assert flashsae.evaluate(sae, held_out).l0 == pytest.approx(6.0, rel=0.03)


@pytest.mark.parametrize("form", ["quadratic", "gated"])
def test_a_resumed_training_ends_with_the_same_bytes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"checkpoint_every_steps": 7, "dead_after_tokens": 2048, "batch_tokens": 512}
    same_after_a_kill(
        tmp_path, monkeypatch, x=X, d_sae=512, arch=TRAINED[form], tokens=512 * STEPS, device="cuda", **settings
    )

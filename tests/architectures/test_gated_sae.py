from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, GatedSettings, SAEConfig
from flashsae.architecture import Progress
from flashsae.architectures.gated import gate_fvu
from flashsae.data.synthetic import SuperpositionModel
from flashsae.testing import DenseTrainer, assert_as_accurate
from helpers.language_acts import language_acts
from helpers.on_both import as_float64, assert_same, on_kernels, on_reference
from helpers.resumed import same_after_a_kill
from helpers.sae_steps import dense_step, our_step, parameters_of, sae_of, step_of
from helpers.steps import Tensors

ARCH = GatedSettings(l1=0.5)


def inputs_of(generator: torch.Generator, *, integer: bool, B: int = 8, n: int = 40) -> Tensors:
    found = parameters_of(ARCH, B, 8, n, generator, integer=integer, dtype=torch.float32)
    return {**found, "r_mag": torch.zeros(n)} if integer else found  # exp of 0 alone is an integer


def test_a_step_is_bitwise_that_of_the_dense_formulas(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    exact = dense_step(ARCH, as_float64(inputs))
    for name in ("b_enc", "r_mag", "b_mag"):
        assert exact[f"grad {name}"].count_nonzero() > 10
    ours, theirs = (run(lambda given: our_step(ARCH, given), inputs) for run in (on_kernels, on_reference))
    assert_same(ours, theirs, exact)


@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_a_step_is_as_accurate_as_dense_pytorch_and_repeats(run: Any, generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=False, B=17, n=50)
    ours, again = (run(lambda given: our_step(ARCH, given), inputs) for _ in range(2))
    peer, exact = dense_step(ARCH, inputs), dense_step(ARCH, as_float64(inputs))
    assert set(ours) == set(exact)
    for name, truth in exact.items():
        assert torch.equal(ours[name], again[name]), name
        assert_as_accurate(ours[name], peer[name], truth, name)


def test_a_latent_is_active_where_its_gate_is_open_by_hand() -> None:
    sae = SAE(SAEConfig(4, 4, arch=GatedSettings()), dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0, -1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.eye(4))
        sae.b_enc.copy_(torch.tensor([-1.0, 0.5, 3.0, 0.25]))  # the first gate is at 0, which is closed
        sae.r_mag.copy_(torch.tensor([0.0, 2.0, 0.0, 0.0]).log1p())
        sae.b_mag.copy_(torch.tensor([0.0, 0.5, -2.0, 0.5]))
    expected = [[0.0, 3 * 2 + 0.5, 0.0, 0.5]]  # the magnitude of the third is below 0
    for is_training in (True, False):
        torch.testing.assert_close(sae.train(is_training).encode(x).to_dense(), torch.tensor(expected).double())


@pytest.mark.parametrize("b_enc", [-1e4, 0.0, 1e4], ids=["all dead", "some", "all alive"])
@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_tokens_may_have_no_latent_or_all(run: Any, b_enc: float, generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    inputs["b_enc"] = inputs["b_enc"] * 0 + b_enc
    ours = run(lambda given: our_step(ARCH, given), inputs)
    peer, exact = dense_step(ARCH, inputs), dense_step(ARCH, as_float64(inputs))
    for name, truth in exact.items():
        assert_as_accurate(ours[name], peer[name], truth, name)


@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_room_changes_nothing_and_what_finds_none_is_counted(run: Any, generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    exact = dense_step(ARCH, as_float64(inputs))

    def with_room(capacity: Any) -> Any:
        return lambda given: our_step(ARCH, given, capacity=capacity)

    for capacity in (320, None, "any", "full"):
        for name, tensor in run(with_room(capacity), inputs).items():
            assert torch.equal(tensor.double(), exact[name]), f"{capacity}: {name}"
    sae = sae_of(ARCH, inputs)
    sae.capacity = 10
    assert int(sae.encode(inputs["x"]).pattern.left_out) > 0


def test_no_tokens_make_a_step_and_a_token_of_nan_shows() -> None:
    sae = SAE(SAEConfig(8, 40, arch=ARCH))
    loss, _ = step_of(sae, torch.zeros(0, 8)).total(SimpleNamespace(auxk_alpha=0.0))
    loss.backward()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    x[1, 2] = torch.nan
    for is_training in (True, False):
        assert sae.train(is_training)(x).isnan().all(1).tolist() == [False, True, False]


def test_another_unit_changes_nothing(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=False, B=37)
    sae = sae_of(ARCH, inputs)
    with torch.no_grad():
        code, other = sae.encode(inputs["x"]), sae.rescaled(4.0).encode(inputs["x"] / 4)
    assert torch.equal(other.pattern.latents, code.pattern.latents)
    assert torch.equal(other.acts * 4, code.acts)


def test_nothing_of_the_gate_reaches_the_decoder(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    sae = sae_of(ARCH, inputs)
    loss = gate_fvu(step_of(sae, inputs["x"]))
    loss.backward()
    assert sae.W_dec.grad is sae.r_mag.grad is sae.b_mag.grad is None
    assert sae.W_enc_T.grad.count_nonzero() > 10
    assert sae.b_dec.grad.count_nonzero() > 0  # as what is subtracted from x, which is not frozen


def test_a_training_is_that_of_the_dense_trainer() -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(64 * 20, seed=0).double()
    sae = SAE(SAEConfig(12, 40, arch=GatedSettings(l1=0.3, l1_warmup=0.1)), dtype=torch.float64)
    sae.initialize_from(x)
    dense = DenseTrainer(dict(sae.named_parameters()), 1e-2, 4.0, "gated", l1=0.3)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2, eps=6.25e-10)
    for number, batch in enumerate(x.split(64)):
        sae.set_progress(Progress(number, 20))
        loss, _ = step_of(sae, batch).total(SimpleNamespace(auxk_alpha=0.0))
        expected = dense.step(batch, ramp=min(1.0, number / 2))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_grad()
        optimizer.step()
        sae.normalize_decoder()


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(3000, seed=0)
    settings: dict[str, Any] = {"checkpoint_every_steps": 10, "dead_after_tokens": 640, "batch_tokens": 128}
    sae = same_after_a_kill(
        tmp_path, monkeypatch, x=x, d_sae=48, arch="gated", l1=0.2, auxk_alpha=0.03, tokens=128 * 35, **settings
    )
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.slow
def test_a_training_on_activations_of_a_language_model_is_sparser_with_a_larger_weight() -> None:
    x, held_out = language_acts()
    settings: dict[str, Any] = {"tokens": 512 * 200, "batch_tokens": 512, "progress": False}
    found = [
        flashsae.evaluate(flashsae.fit(x, d_sae=768, arch="gated", l1=l1, **settings), held_out) for l1 in (0.2, 0.4)
    ]
    print([(result.l0, result.fvu) for result in found])
    assert found[1].l0 < 0.7 * found[0].l0 < 64
    assert found[0].fvu < found[1].fvu < 0.4

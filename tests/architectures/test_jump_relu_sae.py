from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flashsae
from flashsae import SAE, JumpReLUSettings, SAEConfig
from flashsae.architecture import Progress, architecture_named
from flashsae.architectures.jump_relu import control_l0, pre_act_loss
from flashsae.cli import main
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError, FlashSAEWarning
from flashsae.sae import exceeds, jump_relu
from flashsae.testing import DenseTrainer, assert_as_accurate, dense_pre_act_loss
from helpers.language_acts import language_acts
from helpers.on_both import as_float64, assert_same, on_kernels, on_reference
from helpers.resumed import same_after_a_kill
from helpers.sae_steps import dense_step, our_step, parameters_of, sae_of, step_of
from helpers.steps import Tensors

BASE = JumpReLUSettings(target_l0=4.0, penalty="l0", sparsity_weight=0.5, bandwidth=4.0)
FREQUENT = {"frequency_weight": 0.25, "frequency_scale": 0.125}
FORMS = {
    "l0": BASE,
    "quadratic": replace(BASE, penalty="quadratic", **FREQUENT),
    "everywhere": replace(BASE, ste_to_input=True, **FREQUENT),
}
NARROW = {
    "quadratic": replace(FORMS["quadratic"], bandwidth=0.4),
    "everywhere": replace(FORMS["everywhere"], bandwidth=0.4),
    "tanh": replace(BASE, penalty="tanh", bandwidth=0.4),
}


def inputs_of(generator: torch.Generator, *, integer: bool, B: int = 8, n: int = 40) -> Tensors:
    found = parameters_of(BASE, B, 8, n, generator, integer=integer, dtype=torch.float32)
    return {**found, "threshold": found["threshold"].abs() + (1.0 if integer else 0.1)}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_bitwise_that_of_the_dense_formulas(form: str, generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    exact = dense_step(FORMS[form], as_float64(inputs))
    assert exact["grad threshold"].count_nonzero() > 10
    assert 0 < exact["latent_acts"].count_nonzero() < 160
    ours, theirs = (run(lambda given: our_step(FORMS[form], given), inputs) for run in (on_kernels, on_reference))
    assert_same(ours, theirs, exact)


@pytest.mark.parametrize("form", NARROW)
@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_a_step_is_as_accurate_as_dense_pytorch_and_repeats(run: Any, form: str, generator: torch.Generator) -> None:
    arch, inputs = NARROW[form], inputs_of(generator, integer=False, B=17, n=50)
    ours, again = (run(lambda given: our_step(arch, given, unit=1.5), inputs) for _ in range(2))
    peer, exact = dense_step(arch, inputs, unit=1.5), dense_step(arch, as_float64(inputs), unit=1.5)
    assert set(ours) == set(exact)
    for name, truth in exact.items():
        assert torch.equal(ours[name], again[name]), name
        assert_as_accurate(ours[name], peer[name], truth, name)


def test_the_jump_and_its_estimate_by_hand() -> None:
    pre_acts = torch.tensor([0.5, 1.75, 2.0, 2.25, 2.5, 9.0, torch.nan], requires_grad=True)
    threshold = torch.full((7,), 2.0, requires_grad=True)
    found = jump_relu(pre_acts, threshold, torch.tensor(1.0))
    assert found[:6].tolist() == [0.0, 0.0, 0.0, 2.25, 2.5, 9.0]  # what equals its threshold does not exceed it
    assert found[6].isnan()
    found[:6].sum().backward()
    assert pre_acts.grad is not None
    assert threshold.grad is not None
    assert pre_acts.grad.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert threshold.grad.tolist() == [0.0, -2.0, -2.0, -2.0, 0.0, 0.0, 0.0]  # 2.5 stands on the rim of the window
    threshold.grad = pre_acts.grad = None
    active = exceeds(pre_acts, threshold, torch.tensor(1.0), ste_to_input=True)
    assert active.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    active[:6].sum().backward()
    assert threshold.grad.tolist() == [0.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert pre_acts.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("b_enc", [-1e4, 0.0, 1e4], ids=["all dead", "some", "all alive"])
@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_tokens_may_have_no_latent_or_all(run: Any, b_enc: float, generator: torch.Generator) -> None:
    arch, inputs = FORMS["quadratic"], inputs_of(generator, integer=True)
    inputs["b_enc"] = inputs["b_enc"] * 0 + b_enc
    ours, exact = run(lambda given: our_step(arch, given), inputs), dense_step(arch, as_float64(inputs))
    assert len(ours["latent_acts"].count_nonzero(1).unique()) > 1 or b_enc
    peer = dense_step(arch, inputs)
    for name, truth in exact.items():
        assert_as_accurate(ours[name], peer[name], truth, name)


def test_no_tokens_make_a_step() -> None:
    sae = SAE(SAEConfig(8, 40, arch=FORMS["quadratic"]))
    loss, _ = step_of(sae, torch.zeros(0, 8)).total(SimpleNamespace(auxk_alpha=0.0))
    loss.backward()
    before = sae.threshold.detach().clone()
    with torch.no_grad():
        control_l0(sae, sae.encode(torch.zeros(0, 8)))
    assert torch.equal(sae.threshold, before)


def test_a_token_of_nan_shows() -> None:
    sae, x = SAE(SAEConfig(8, 40, arch=BASE)), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    x[1, 2] = torch.nan
    for is_training in (True, False):
        x_hat = sae.train(is_training)(x)
        assert x_hat.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_room_changes_nothing_and_what_finds_none_is_counted(run: Any, generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=True)
    exact = dense_step(FORMS["quadratic"], as_float64(inputs))
    entries = int((exact["latent_acts"] > 0).sum())

    def with_room(capacity: Any) -> Any:
        def function(given: Tensors) -> Tensors:
            sae = sae_of(FORMS["quadratic"], given)
            sae.capacity = capacity
            step = step_of(sae, given["x"])
            loss, _ = step.total(SimpleNamespace(auxk_alpha=0.0))
            loss.backward()
            left_out = step.code.pattern.left_out
            return {
                "loss": loss.detach(),
                "left_out": torch.tensor(0) if left_out is None else left_out,
                **{f"grad {name}": value.grad for name, value in sae.named_parameters() if value.grad is not None},
            }

        return function

    for capacity in (320, "any", "full"):
        found = run(with_room(capacity), inputs)
        assert int(found.pop("left_out")) == 0
        for name, tensor in found.items():
            assert torch.equal(tensor.double(), exact[name]), f"{capacity}: {name}"
    assert int(run(with_room(entries // 2), inputs)["left_out"]) > 0


def test_inference_holds_what_exceeds_its_threshold_alone(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=False, B=37)
    sae = sae_of(replace(BASE, bandwidth=1.0), inputs)
    sae.capacity = None
    trained, used = sae.encode(inputs["x"]), sae.eval().encode(inputs["x"])
    assert torch.equal(trained.to_dense(), used.to_dense())
    assert bool((used.acts > 0).all())
    assert len(used.acts) < len(trained.acts)
    pre_acts = (inputs["x"] - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert len(trained.acts) == int((pre_acts > sae.threshold - 0.5).sum())


def test_another_unit_changes_nothing(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=False, B=37)
    sae = sae_of(BASE, inputs, unit=0.25)
    with torch.no_grad():
        code, other = sae.encode(inputs["x"]), sae.rescaled(4.0).encode(inputs["x"] / 4)
    assert torch.equal(other.pattern.latents, code.pattern.latents)
    assert torch.equal(other.acts * 4, code.acts)
    assert float(sae.rescaled(4.0).unit) == 0.0625


@pytest.mark.parametrize("run", [on_kernels, on_reference])
def test_the_pre_activation_loss_of_dead_latents_is_the_dense_one(run: Any, generator: torch.Generator) -> None:
    inputs = {**inputs_of(generator, integer=False, B=37, n=70)}
    inputs["threshold"][:20] = 50.0  # most of the dead are far below
    dead = torch.zeros(70, dtype=torch.bool)
    dead[:30] = True

    def ours(given: Tensors) -> Tensors:
        sae = sae_of(BASE, given, unit=0.5)
        loss = pre_act_loss(step_of(sae, given["x"], dead.to(given["x"].device)))
        assert loss is not None
        loss.backward()
        grads = {name: getattr(sae, name).grad for name in ("W_enc_T", "b_enc", "b_dec", "threshold")}
        return {"loss": loss.detach(), **grads}

    def dense(given: Tensors) -> Tensors:
        params = {name: value.clone().requires_grad_() for name, value in given.items() if name != "x"}
        loss = dense_pre_act_loss(given["x"], params, dead, 0.5)
        loss.backward()
        grads = {name: params[name].grad for name in ("W_enc_T", "b_enc", "b_dec", "threshold")}
        return {"loss": loss.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}

    found, peer, exact = run(ours, inputs), dense(inputs), dense(as_float64(inputs))
    for name, truth in exact.items():
        assert_as_accurate(found[name], peer[name], truth, name)
    assert bool((found["threshold"] > 0)[:30].all())
    assert not found["threshold"][30:].any()


def test_a_training_is_that_of_the_dense_trainer() -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(64 * 20, seed=0).double()
    arch = JumpReLUSettings(target_l0=3.0, bandwidth=0.2, threshold_control=0.0, frequency_weight=0.1)
    sae = SAE(SAEConfig(12, 40, arch=arch), dtype=torch.float64)
    sae.initialize_from(x)
    settings = {"target_l0": 3.0, "bandwidth": 0.2, "threshold_control": 0.0, "frequency_weight": 0.1}
    dense = DenseTrainer(dict(sae.named_parameters()), 1e-2, 4.0, "jump_relu", **settings)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2, eps=6.25e-10)
    for number, batch in enumerate(x.split(64)):
        sae.set_progress(Progress(number, 20))
        step = step_of(sae, batch)
        loss, _ = step.total(SimpleNamespace(auxk_alpha=0.0))
        expected = dense.step(batch, ramp=min(1.0, number / 2), unit=float(sae.unit), multiplier=float(sae.multiplier))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_grad()
        optimizer.step()
        sae.normalize_decoder()
        with torch.no_grad():
            control_l0(sae, step.code)
            dense.params["threshold"].clamp_(min=0)
    assert abs(float(sae.multiplier)) > 1e-3


def test_thresholds_are_scaled_towards_the_target() -> None:
    sae = SAE(SAEConfig(12, 40, arch=JumpReLUSettings(target_l0=9.0)))
    x = SuperpositionModel(12, 24, active=3.0).sample(500, seed=0)
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(-0.1, 0.9, 40))
        sae.set_progress(Progress(400, 1000))  # a twentieth of the steps is 20
        code = sae.encode(x)
        excess = float((code.acts > 0).sum()) / 500 / 9 - 1
        assert 0.05 < abs(excess) < 0.5
        expected = (sae.threshold * (1 + excess / 20)).clamp_min(0)
        control_l0(sae, code)
        torch.testing.assert_close(sae.threshold.detach(), expected)
        assert float(sae.multiplier) == pytest.approx(0.5 * excess / 20)
        assert float(sae.mean_excess) == pytest.approx(excess / 20)
        sae.set_progress(Progress(50, 1000))  # while the penalty rises
        control_l0(sae, code)
        torch.testing.assert_close(sae.threshold.detach(), expected)
        assert float(sae.multiplier) == pytest.approx(0.5 * excess / 20)
        sae.set_progress(Progress(400, 1000))
        for _ in range(200):  # however long it is off: as far as by all of the target, and no further
            control_l0(sae, code.replace(code.acts * 0))
        assert float(sae.multiplier) == -1.0


def test_the_multiplier_shifts_the_slopes_of_the_penalty_and_not_its_value(generator: torch.Generator) -> None:
    inputs = inputs_of(generator, integer=False)
    plain, shifted = (our_step(FORMS["quadratic"], inputs, multiplier=value) for value in (0.0, 0.25))
    assert torch.equal(plain["loss"], shifted["loss"])
    l0 = float((plain["latent_acts"] > 0).sum()) / 8
    further = replace(FORMS["quadratic"], target_l0=4.0 - 0.25 * 4.0)  # the slopes of a target that is lower by that
    expected = {**our_step(further, inputs)}
    slope = {name: 2 * 2 / target * (l0 - target) for name, target in (("expected", 3.0), ("plain", 4.0))}
    assert l0 != 4.0
    other = our_step(replace(FORMS["quadratic"], sparsity_weight=0.0), inputs)["grad threshold"]
    torch.testing.assert_close(
        shifted["grad threshold"] - other, (plain["grad threshold"] - other) * (1 + 0.25 * 4 * 4 / 4 / slope["plain"])
    )
    torch.testing.assert_close(
        (shifted["grad threshold"] - other) * 3.0, (expected["grad threshold"] - other) * 3.0 * 3.0 / 4.0
    )


def test_it_starts_with_so_many_latents_or_with_a_given_threshold() -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(4000, seed=0) * 8 + 3
    sae = SAE(SAEConfig(12, 40, arch=JumpReLUSettings(target_l0=4.0)))
    sae.initialize_from(x)
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(4.0, rel=0.01)
    norms = (x - x.mean(0)).square().sum(1).mean().sqrt()
    assert float(sae.unit) == pytest.approx(float(norms), rel=1e-6)
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))
    given = SAE(SAEConfig(12, 40, arch=JumpReLUSettings(initial_threshold=0.001)))
    given.initialize_from(x)
    torch.testing.assert_close(given.threshold.detach(), torch.full((40,), float(norms) / 1000))
    assert flashsae.evaluate(given, x).l0 > 15


def test_weights_of_penalties_that_are_left_open_are_those_of_the_penalty() -> None:
    assert JumpReLUSettings().penalty_weight == 1.0
    assert JumpReLUSettings(penalty="tanh").penalty_weight == 0.002
    assert JumpReLUSettings(penalty="tanh", sparsity_weight=0.0).penalty_weight == 0.0
    with pytest.raises(ConfigError, match="penalty: expected one of quadratic, l0, tanh, got 'l1'"):
        JumpReLUSettings(penalty="l1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target_l0: expected target_l0 <= d_sae = 40, got 41"):
        SAEConfig(8, 40, arch=JumpReLUSettings(target_l0=41))
    schedule = architecture_named("jump_relu").schedule
    assert schedule is not None
    config = SAEConfig(8, 40, arch=JumpReLUSettings(sparsity_warmup=0.5))
    assert [schedule(config, Progress(step, 100))["ramp"] for step in (0, 25, 50, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule(config, Progress.end())["ramp"] == 1.0


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(3000, seed=0)
    arch = JumpReLUSettings(target_l0=3.0, frequency_weight=0.1, pre_act_weight=0.1)
    settings: dict[str, Any] = {"checkpoint_every_steps": 10, "dead_after_tokens": 640, "batch_tokens": 128}
    same_after_a_kill(tmp_path, monkeypatch, x=x, d_sae=48, arch=arch, tokens=128 * 35, **settings)


def test_it_is_trained_saved_loaded_and_measured_by_its_name(tmp_path: Path) -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(3000, seed=0)
    settings: dict[str, Any] = {"tokens": 128 * 30, "batch_tokens": 128, "log_every_steps": 1, "progress": False}
    sae = flashsae.fit(x, d_sae=48, arch="jump_relu", target_l0=3, run=tmp_path / "run", **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert records[0]["quadratic_penalty"] == 0.0  # nothing of it is felt at the first step
    assert all(r["loss"] >= r["fvu"] + r["quadratic_penalty"] - 1e-6 for r in records)
    assert "l0_penalty" not in records[-1]
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))
    assert flashsae.evaluate(loaded, x).l0 == pytest.approx(float((sae.encode(x).to_dense() > 0).sum()) / 3000)


def test_frequent_latents_become_rare_by_their_penalty() -> None:
    x = SuperpositionModel(16, 32, active=3.0).sample(6000, seed=0)
    x[:, 0] += 3 * torch.rand(6000, generator=torch.Generator().manual_seed(5))  # something is there on most tokens
    settings: dict[str, Any] = {"tokens": 256 * 100, "batch_tokens": 256, "lr": 1e-2, "progress": False}
    arch: dict[str, Any] = {"d_sae": 96, "arch": "jump_relu", "target_l0": 4}
    saes = [flashsae.fit(x, **arch, **settings)]
    with pytest.warns(FlashSAEWarning, match="below the target_l0 of 4"):  # so heavy a penalty keeps it from there
        saes.append(flashsae.fit(x, **arch, frequency_weight=10.0, **settings))
    densities = [flashsae.evaluate(sae, x).latent_density for sae in saes]
    assert densities[1].max() < 0.3 < 0.5 < densities[0].max()
    assert float(densities[1].sum()) == pytest.approx(4, rel=0.1)


def test_the_target_is_reached_on_synthetic_activations() -> None:
    model = SuperpositionModel(24, 64, active=5.0, noise=0.02)
    x, held_out = model.sample(20_000, seed=1), model.sample(10_000, seed=2)
    settings: dict[str, Any] = {"tokens": 512 * 120, "batch_tokens": 512, "lr": 3e-3, "progress": False}
    sae = flashsae.fit(x, d_sae=128, arch="jump_relu", target_l0=5.0, **settings)
    result = flashsae.evaluate(sae, held_out)
    assert result.l0 == pytest.approx(5.0, rel=0.02)
    topk = flashsae.fit(x, d_sae=128, arch="batch_topk", k=5, **settings)
    assert result.fvu < 1.1 * flashsae.evaluate(topk, held_out).fvu < 0.4


def test_l0_stays_on_a_target_that_the_reconstruction_pulls_it_off(tmp_path: Path) -> None:
    x = SuperpositionModel(24, 64, active=5.0, noise=0.02).sample(30_000, seed=1)
    settings: dict[str, Any] = {"tokens": 256 * 300, "batch_tokens": 256, "log_every_steps": 1, "progress": False}
    sae = flashsae.fit(x, d_sae=128, arch="jump_relu", target_l0=1.5, run=tmp_path / "run", **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    l0 = torch.tensor([record["l0"] for record in records])
    assert l0[100:].mean() == pytest.approx(1.5, rel=0.01)  # 2 % high without the multiplier
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(1.5, rel=0.02)
    assert (float(sae.multiplier), float(sae.mean_excess)) == (0.0, 0.0)  # of the training, and not of the SAE
    sae.save(tmp_path / "sae")
    assert "multiplier" not in load_file(tmp_path / "sae" / "flashsae.safetensors")


def test_a_target_that_is_not_reached_is_told() -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(2000, seed=0)
    settings: dict[str, Any] = {"tokens": 256 * 60, "batch_tokens": 256, "d_sae": 24, "progress": False}
    with pytest.warns(FlashSAEWarning, match=r"ends with an L0 of [\d.]+ on average .* below the target_l0 of 24"):
        flashsae.fit(x, arch="jump_relu", target_l0=24, **settings)
    with pytest.warns(FlashSAEWarning, match=r"above the target_l0 of 2: .*, or a higher target_l0"):
        flashsae.fit(x, arch="jump_relu", target_l0=2, initial_threshold=1e-3, lr=1e-5, threshold_control=0, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("target_l0", [8.0, 24.0])
def test_the_target_is_reached_on_activations_of_a_language_model_and_stays(target_l0: float, tmp_path: Path) -> None:
    x, held_out = language_acts()
    settings: dict[str, Any] = {"tokens": 512 * 200, "batch_tokens": 512, "log_every_steps": 1, "progress": False}
    sae = flashsae.fit(x, d_sae=768, arch="jump_relu", target_l0=target_l0, run=tmp_path / "run", **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    for first in range(60, 200, 20):
        assert sum(record["l0"] for record in records[first : first + 20]) / 20 == pytest.approx(target_l0, rel=0.03)
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(target_l0, rel=0.02)
    result = flashsae.evaluate(sae, held_out)
    print(f"target {target_l0}: held-out L0 {result.l0:.3f}, FVU {result.fvu:.4f}")
    assert result.l0 == pytest.approx(target_l0, rel=0.2)  # ten thousand tokens that came ten times are known by heart
    assert result.fvu < 0.3


@pytest.mark.parametrize(("arch", "own", "other"), [("jump_relu", "--target-l0", "--l1"), ("gated", "--l1", "--k ")])
def test_help_shows_the_settings_of_the_architecture_alone(
    arch: str, own: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--arch", arch, "--help"])
    told = capsys.readouterr().out
    assert own in told
    assert other not in told

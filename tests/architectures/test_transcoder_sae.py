"""Transcoders and skip transcoders over any selection: against dense autograd, and in short trainings."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.architecture import architecture_named, settings_of
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.sae import DeadLatents, Step, auxk_loss, fvu_weights
from flashsae.testing import assert_as_accurate, dense_auxk, integer_inputs, oracle

B, D_IN, D_OUT, D_SAE, K = 16, 12, 7, 40, 4
KINDS = [f"{outer}:{base}" for outer in ("transcoder", "skip_transcoder") for base in ("topk", "batch_topk")]


def _sae(kind: str, dtype: torch.dtype = torch.float32, d_out: int = D_OUT, **settings: Any) -> SAE:
    arch = settings_of(kind, **{"k": K, **settings})
    return SAE(SAEConfig(D_IN, D_SAE, arch=arch, d_out=d_out), dtype=dtype)


def _filled(kind: str, generator: torch.Generator, *, integer: bool) -> tuple[SAE, Tensor, Tensor]:
    """Return an SAE with random numbers everywhere, and tokens and targets."""
    sae = _sae(kind)

    def numbers(*shape: int) -> Tensor:
        if integer:
            return integer_inputs(*shape, generator=generator, largest=2)
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(numbers(*parameter.shape))
    return sae, numbers(B, D_IN), numbers(B, D_OUT)


def _ours(sae: SAE, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return loss, reconstruction and every gradient of a step."""
    sae.zero_grad()
    x = x.clone().requires_grad_()
    step = Step(sae, x, target, sae.encode(x), fvu_weights(target, 2.0))
    loss, _ = step.total(TrainConfig(auxk_alpha=0.0))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {f"grad {name}": parameter.grad.clone() for name, parameter in sae.named_parameters()}
    return {"loss": loss.detach(), "x_hat": sae(x).detach(), "grad x": x.grad, **grads}  # type: ignore[dict-item]


def _dense(kind: str, sae: SAE, x: Tensor, target: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    params = {name: value.detach().to(dtype).requires_grad_() for name, value in sae.named_parameters()}
    x = x.detach().to(dtype, copy=True).requires_grad_()
    settings = asdict(sae.config.arch)
    loss = oracle(kind).losses(x, params, 2.0, target=target.to(dtype), **settings)["fvu"]
    loss.backward()  # type: ignore[no-untyped-call]
    x_hat = oracle(kind)(x, params, **settings) @ params["W_dec"] + params["b_dec"]
    if "W_skip" in params:
        x_hat = x_hat + F.linear(x, params["W_skip"])
    grads = {f"grad {name}": value.grad for name, value in params.items()}
    return {"loss": loss.detach(), "x_hat": x_hat.detach(), "grad x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_t0_loss_and_every_gradient(
    kind: str, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if "batch" in kind:
            pytest.skip("its kernels have tests of their own")
        monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    integers = _filled(kind, generator, integer=True)
    ours, exact = _ours(*integers), _dense(kind, *integers, torch.float64)
    assert set(ours) == set(exact)
    for name, value in ours.items():
        assert torch.equal(value.double(), exact[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_t1_to_t3_loss_and_every_gradient(kind: str, generator: torch.Generator) -> None:
    normal = _filled(kind, generator, integer=False)
    ours, again = _ours(*normal), _ours(*normal)
    theirs, exact = (_dense(kind, *normal, dtype) for dtype in (torch.float32, torch.float64))
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        assert_as_accurate(value, theirs[name], exact[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_subtracted_from_what_is_read(kind: str, generator: torch.Generator) -> None:
    sae, x, _ = _filled(kind, generator, integer=False)
    sae.eval()
    before = sae.encode(x).to_dense()
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    assert torch.equal(sae.encode(x).to_dense(), before)
    assert sae.b_pre is None
    assert architecture_named(kind).sites == ("in", "out")


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
def test_auxk_explains_what_is_left_with_dead_latents(kind: str, generator: torch.Generator) -> None:
    sae, x, target = _filled(kind, generator, integer=False)
    dead = DeadLatents(D_SAE, 10)
    dead.tokens_since_fired[::3] = 11
    weights = fvu_weights(target, 2.0)
    decoded = Step(sae, x, target, sae.encode(x), weights).decoded
    direct = F.linear(x, sae.W_skip) if kind == "skip_transcoder" else 0.0
    residual = target - direct - sae.decode(sae.encode(x))
    torch.testing.assert_close(decoded.residual, residual.detach())
    rows = dead.rows(int(dead.mask().sum()))
    ours = auxk_loss(sae, x, decoded, weights, rows, 3)
    params = {name: value for name, value in sae.named_parameters() if name != "b_dec"}
    expected = dense_auxk(x, params, decoded.residual, dead.mask(), 3) / decoded.residual.square().sum()
    torch.testing.assert_close(ours, expected)


def test_a_reconstruction_without_tokens_is_that_of_the_code(generator: torch.Generator) -> None:
    sae, x, _ = _filled("skip_transcoder", generator, integer=True)
    code = sae.encode(x.view(1, B, D_IN))
    whole = sae(x.view(1, B, D_IN))
    assert whole.shape == (1, B, D_OUT)
    assert torch.equal(sae.decode(code, like=x.view(1, B, D_IN)), whole)
    assert torch.equal(sae.decode(code) + F.linear(x, sae.W_skip), whole)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder:batch_topk"])
@pytest.mark.parametrize("factors", [(4.0, 0.5), (0.25, 0.25)])
def test_other_units_of_input_and_output_are_folded(
    kind: str, factors: tuple[float, float], generator: torch.Generator
) -> None:
    sae, x, _ = _filled(kind, generator, integer=True)
    sae.eval()
    into, out = factors
    folded = sae.rescaled(torch.full((D_IN,), into), torch.full((D_OUT,), out))
    assert torch.equal(folded(x), sae(into * x) / out)


# --- trainings ---


def _tokens(n: int, seed: int) -> dict[str, Tensor]:
    """Return inputs, and outputs that are a few features of them through a nonlinearity, and a linear part."""
    features = torch.Generator().manual_seed(5)
    read, write = torch.randn(24, D_IN, generator=features), torch.randn(24, D_OUT, generator=features)
    linear = 0.3 * torch.randn(D_IN, D_OUT, generator=features)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.1)
    x = active @ F.normalize(read, dim=1) + 0.5
    return {"in": 30 * x, "out": active @ F.normalize(write, dim=1) + 0.3 * x @ linear - 1.0}


def _fit(kind: str, steps: int = 200, **others: Any) -> SAE:
    config = TrainConfig(batch_tokens=128, checkpoint_every_steps=10, dead_after_tokens=4000, lr=5e-3)
    return flashsae.fit(
        _tokens(8000, 0), d_sae=D_SAE, arch=kind, k=K, tokens=128 * steps, config=config, progress=False, **others
    )


@functools.cache
def _trained(kind: str) -> SAE:
    return _fit(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_explains_held_out_outputs(kind: str) -> None:
    sae, held_out = _trained(kind), _tokens(3000, 1)
    result = flashsae.evaluate(sae, held_out)
    assert result.fvu < 0.4
    assert abs(result.l0 - K) < 0.15 * K
    residual = held_out["out"] - sae(held_out["in"]).detach()
    deviations = held_out["out"] - held_out["out"].mean(0)
    assert float(residual.square().sum() / deviations.square().sum()) == pytest.approx(result.fvu, rel=1e-4)


def test_a_skip_takes_what_is_linear() -> None:
    held_out = _tokens(3000, 1)
    plain, skip = (flashsae.evaluate(_trained(kind), held_out).fvu for kind in (KINDS[0], KINDS[2]))
    assert skip < 0.9 * plain


@pytest.mark.parametrize("kind", ["transcoder:batch_topk", "skip_transcoder"])
def test_a_resumed_training_ends_with_the_same_bytes_and_is_saved_and_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _fit(kind, 35, run=tmp_path / "whole")
    from flashsae.train import loop

    steps, step = [], loop.train_step

    def stops(*args: object) -> object:
        if len(steps) == 24:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            _fit(kind, 35, run=tmp_path / "cut")
    resumed = _fit(kind, 35, run=tmp_path / "cut", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    whole.save(tmp_path / "sae")
    loaded, x = SAE.load(tmp_path / "sae"), _tokens(50, 2)["in"]
    assert loaded.config == whole.config
    assert torch.equal(loaded(x), whole(x))


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
def test_latents_never_used_and_outputs_at_random_are_survived(kind: str, generator: torch.Generator) -> None:
    x = {"in": torch.randn(600, D_IN, generator=generator), "out": torch.randn(600, D_OUT, generator=generator)}
    config = TrainConfig(batch_tokens=64, tokens=640, dead_after_tokens=64)
    sae = flashsae.fit(x, d_sae=400, arch=kind, k=1, config=config, progress=False)
    assert all(bool(value.isfinite().all()) for value in sae.state_dict().values())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(400))


def test_what_does_not_fit_is_refused() -> None:
    x = _tokens(600, 0)
    with pytest.raises(
        ConfigError,
        match=r"TopK transcoder takes the activations of 2 \(in, out\), got those of 1 \(x\)\. Give them by name: "
        r'fit\({"in": x, "out": y}, arch="transcoder"\); on the command line --hookpoint h\.3\.mlp:in --hookpoint h',
    ):
        flashsae.fit(x["in"], d_sae=16, arch="transcoder", tokens=600, progress=False)
    with pytest.raises(ConfigError, match=r"got those of 3 \(in, out, other\)"):
        flashsae.fit({**x, "other": x["in"]}, d_sae=16, arch="transcoder", tokens=600, progress=False)
    with pytest.raises(ShapeError, match="expected the same tokens at every site, got 600 at in, 599 at out"):
        flashsae.fit({**x, "out": x["out"][1:]}, d_sae=16, arch="transcoder", tokens=600, progress=False)
    with pytest.raises(ConfigError, match="d_out: expected 7, the width of the activations, got 12"):
        flashsae.fit(x, d_sae=16, arch="transcoder", config=TrainConfig(d_out=12, tokens=600), progress=False)
    with pytest.raises(DtypeError, match="expected a dict of in, out, got Tensor"):
        flashsae.fit(iter([x["in"]]), d_sae=16, arch="transcoder", tokens=600, progress=False)
    with pytest.raises(ConfigError, match="k_max: transcoder has no such setting"):
        settings_of("transcoder", k_max=3)
    for inner in ("transcoder", "skip_transcoder", "crosscoder"):
        with pytest.raises(ConfigError, match="arch: a transcoder is made of an autoencoder, and"):
            architecture_named(f"transcoder:{inner}")

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, BatchTopKSettings, Parameter, SAEConfig
from flashsae.architecture import AUTOENCODER
from flashsae.architecture import description as architectures
from flashsae.architectures.batch_topk import ARCHITECTURE as BATCH_TOPK
from flashsae.errors import ConfigError, ShapeError
from flashsae.sae.units import layer_norm
from flashsae.testing import assert_as_accurate


class SkippingSettings(BatchTopKSettings):
    """Settings of an SAE that has every kind of parameter that there is."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    rows = {row.name: row for row in AUTOENCODER}
    flashsae.register(
        replace(
            BATCH_TOPK,
            name="skipping",
            title="Skipping",
            settings=SkippingSettings,
            parameters=(
                replace(rows["W_enc_T"], initial="unit_rows"),
                rows["b_enc"],
                rows["W_dec"],
                rows["b_dec"],
                Parameter("W_skip", ("d_out", "d_in"), "skip", "unit_rows"),
                Parameter("W_gate_T", ("d_sae", "d_in"), "gates", "unit_rows"),
                Parameter("threshold", ("d_sae",), "threshold", 0.5, power=1),
                Parameter("mean", ("d_in",), "of x", 0.25, power=1),
                Parameter("spread", (), "square of a value", 2.0, power=2),
                Parameter("norms", ("d_sae",), "what stays", 3.0, trained=False),
            ),
            encode=encode,
            direct=lambda sae, x: x @ sae.W_skip.T,
            subtracts_b_dec=False,
            after_step=None,
            reads=("before",),
            writes=("after",),
        )
    )
    yield
    architectures._REGISTERED.pop("skipping")


def encode(sae: Any, x: Tensor) -> Any:
    gate = (x - sae.mean) @ sae.W_gate_T.T + sae.b_enc > sae.threshold
    dense = ((x @ sae.W_enc_T.T) * gate).relu()
    dense = dense.where(dense.square() < sae.spread * 4, 0.0)
    return flashsae.SparseCode.topk(dense, torch.arange(dense.shape[1]).expand(dense.shape), dense.shape[1])


def filled(sae: SAE, *, exact: bool) -> SAE:
    generator = torch.Generator().manual_seed(3)
    for tensor in sae.state_dict().values():
        if tensor.dim():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_((noise * 8).round() / 8 if exact else noise / 2)
    return sae


def columns(factors: list[float], width: int) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64).repeat_interleave(width // len(factors))


FACTORS = {
    "one": (8.0, None),
    "in and out": (0.5, 4.0),
    "sites": (columns([2.0, 0.25, 1.0], 12), columns([4.0, 0.125], 6)),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_powers_of_two_are_folded_bit_for_bit(kind: str, generator: torch.Generator) -> None:
    factor, factor_out = FACTORS[kind]
    sae = filled(SAE(SAEConfig(12, 20, arch=SkippingSettings(k=3), d_out=6)), exact=True)
    x = torch.randint(-3, 4, (30, 12), generator=generator) / (columns([2.0, 0.25, 1.0], 12).float() * 4)
    other = sae.rescaled(factor, factor_out)
    x_hat, code, expected = other(x), other.encode(x), sae.encode(factor * x.double())
    written = factor if factor_out is None else factor_out
    assert torch.equal(code.to_dense() != 0, expected.to_dense() != 0)
    assert 0 < (expected.to_dense() != 0).float().mean() < 0.9
    assert torch.equal(x_hat, (sae(factor * x.double()) / written).float())
    for row in sae.architecture.parameters:
        if isinstance(written, float) and row.name in ("W_dec", "norms"):
            assert getattr(other, row.name).data_ptr() == getattr(sae, row.name).data_ptr()


@pytest.mark.parametrize("kind", FACTORS)
def test_the_folded_sae_is_as_accurate_as_the_scaled_one(kind: str, generator: torch.Generator) -> None:
    factor, factor_out = FACTORS[kind]
    factor = 1.37 * factor
    written = factor if factor_out is None else factor_out
    sae = filled(SAE(SAEConfig(12, 20, arch=SkippingSettings(k=3), d_out=6)), exact=False)
    x = torch.randn(40, 12, generator=generator) / (factor if isinstance(factor, Tensor) else 1)
    x = x.float()
    wide = SAE(sae.config, dtype=torch.float64)
    wide.load_state_dict(sae.state_dict())
    with torch.no_grad():
        reference = wide(factor * x.double()) / written
        scaled = sae((factor * x.double()).float()).double() / written
        assert_as_accurate(sae.rescaled(factor, factor_out)(x), scaled.float(), reference)


def test_factors_that_are_none_are_refused() -> None:
    sae = SAE(SAEConfig(12, 20, 5))
    for factor in (0.0, -1.0, float("inf"), float("nan"), True, "2", torch.zeros(12), torch.full((12,), torch.nan)):
        with pytest.raises(ConfigError, match="factor: expected "):
            sae.rescaled(factor)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"factor: expected a number, or a tensor of the shape \[12\], got \[5\]"):
        sae.rescaled(torch.ones(5))
    with pytest.raises(ConfigError, match="no unit that could be changed"):
        sae.normalizing("layer_norm").rescaled(2.0)
    assert torch.equal(sae.rescaled(torch.full((12,), 4.0)).b_dec, sae.rescaled(4).b_dec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_layer_norm_is_that_of_the_formula_in_every_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (3 + 2 * torch.randn(5, 4, 12, generator=generator)).to(dtype)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (wide.std(-1, keepdim=True) + 1e-5)
    assert layer_norm(x).dtype == dtype
    rounds = 2**-48 if dtype == torch.float64 else 0.0
    torch.testing.assert_close(layer_norm(x), expected.to(dtype), rtol=rounds, atol=rounds)


def test_layer_norm_of_equal_and_of_huge_coordinates_is_finite() -> None:
    assert torch.equal(layer_norm(torch.full((3, 7), 0.1)), torch.zeros(3, 7))
    huge = torch.tensor([[1.0, 2.0, 3.0]]) * 1e37
    torch.testing.assert_close(layer_norm(huge), torch.tensor([[-1.0, 0.0, 1.0]]))


@pytest.fixture
def normalizing() -> SAE:
    sae = SAE(SAEConfig(12, 20, 5, normalize_activations="layer_norm"), seed=1)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae


def test_an_sae_that_normalises_gives_tokens_their_statistics_back(
    normalizing: SAE, tmp_path: Path, generator: torch.Generator
) -> None:
    x = 50 + 20 * torch.randn(4, 9, 12, generator=generator)
    plain = normalizing.normalizing("none")
    code = normalizing.encode(x)
    assert torch.equal(code.to_dense(), plain.encode(layer_norm(x)).to_dense())
    assert torch.equal(normalizing.decode(code), plain.decode(code))  # without tokens it stays normalised
    mean, deviation = x.double().mean(-1, keepdim=True), x.double().std(-1, keepdim=True)
    expected = (plain.decode(code).double() * deviation + mean).float()
    assert torch.equal(normalizing.decode(code, like=x), expected)
    assert torch.equal(normalizing(x), expected)
    assert torch.equal(plain.decode(code, like=x), plain.decode(code))
    assert plain.b_dec.data_ptr() == normalizing.b_dec.data_ptr()
    with pytest.raises(ShapeError, match=r"like: expected the tokens of the code, \[4, 9, 12\], got \[9, 12\]"):
        normalizing.decode(code, like=x[0])
    normalizing.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == normalizing.config
    assert torch.equal(loaded(x), expected)


def test_figures_of_an_sae_that_normalises_are_of_tokens_as_they_come(
    normalizing: SAE, generator: torch.Generator
) -> None:
    x = 5 + 20 * torch.randn(200, 12, generator=generator).double()
    normalizing.initialize_from(x)
    x_hat = normalizing(x.float()).detach().double()
    expected = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert flashsae.evaluate(normalizing, x).fvu == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(normalizing.b_dec.detach(), layer_norm(x).mean(0).float())


def test_gradients_pass_through_the_statistics_of_a_token(normalizing: SAE, generator: torch.Generator) -> None:
    x = torch.randn(6, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    wide = normalizing.double()
    (wide(x) * upstream).sum().backward()
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    seen = (x - mean) / (deviation + 1e-5)
    dense = ((seen - wide.b_dec) @ wide.W_enc).relu() * (wide.encode(x.detach()).to_dense() != 0)
    (expected,) = torch.autograd.grad((((dense @ wide.W_dec + wide.b_dec) * deviation + mean) * upstream).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_where_tokens_cannot_be_normalised_it_is_said() -> None:
    for config, message in (
        ({"d_in": 1, "arch": BatchTopKSettings(k=3)}, "at least two coordinates a site, got 1"),
        (
            {"d_in": 8, "arch": SkippingSettings(k=3)},
            "Skipping reads or reconstructs others beside it. Take mean_square",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            SAEConfig(d_sae=40, normalize_activations="layer_norm", **config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="normalize_activations: expected one of none, layer_norm, token_norm, got"):
        SAEConfig(8, 40, 3, normalize_activations="mean_square")


def test_tokens_by_their_norm_are_those_of_the_formula(generator: torch.Generator, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(12, 20, 5, normalize_activations="token_norm"), seed=1)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    x = 50 + 20 * torch.randn(4, 9, 12, generator=generator)
    norm = x.double().norm(dim=-1, keepdim=True) / 12**0.5
    plain = sae.normalizing("none")
    code = plain.encode((x.double() / norm).float())
    assert torch.equal(sae.encode(x).to_dense(), code.to_dense())
    expected = (plain.decode(code).double() * norm).float()
    assert torch.equal(sae(x), expected)
    assert torch.equal(sae.decode(sae.encode(x)), plain.decode(code))  # without tokens it stays normalised
    sae.save(tmp_path / "sae")
    content = (tmp_path / "sae" / "flashsae.json").read_text()
    assert '"format_version": 4' in content  # which readers of version 3 refuse
    assert torch.equal(SAE.load(tmp_path / "sae")(x), expected)
    with pytest.raises(ConfigError, match="no unit that could be changed"):
        sae.rescaled(2.0)


def test_a_token_of_norm_0_stays_0(generator: torch.Generator) -> None:
    sae = SAE(SAEConfig(12, 20, 5, normalize_activations="token_norm"), seed=1)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    x = torch.randn(3, 12, generator=generator)
    x[1] = 0.0
    x_hat = sae(x)
    assert torch.equal(x_hat[1], torch.zeros(12))
    assert bool(x_hat.isfinite().all())
    huge = torch.tensor([[1.0, 2.0, 2.0]]) * 1e38  # whose squares no float32 holds
    small = SAE(SAEConfig(3, 4, 2, normalize_activations="token_norm"))
    assert bool(small(huge).isfinite().all())


def test_each_of_several_sites_has_a_norm_of_its_own(generator: torch.Generator) -> None:
    settings = flashsae.architecture.settings_of("crosscoder", k=2, sites=("a", "b"), widths=(3, 5))
    sae = SAE(SAEConfig(8, 12, arch=settings, normalize_activations="token_norm"), seed=1).eval()
    sae.threshold.fill_(0.1)
    x = torch.randn(6, 8, generator=generator)
    torch.testing.assert_close(sae(torch.cat([4 * x[:, :3], x[:, 3:]], 1))[:, :3], 4 * sae(x)[:, :3])


def test_where_a_norm_cannot_be_undone_it_is_said() -> None:
    with pytest.raises(ConfigError, match="token_norm is undone with the norm of the token that is read, and Skipping"):
        SAEConfig(8, 40, arch=SkippingSettings(k=3), normalize_activations="token_norm")
    assert SAEConfig(1, 4, 2, normalize_activations="token_norm").d_in == 1


def test_a_training_by_the_norm_of_tokens_resumes_bit_for_bit(tmp_path: Path, generator: torch.Generator) -> None:
    x = torch.randn(800, 12, generator=generator) * torch.rand(800, 1, generator=generator)
    settings: dict[str, Any] = {"d_sae": 20, "k": 4, "tokens": 800, "batch_tokens": 100, "progress": False}
    settings |= {"normalize_activations": "token_norm", "checkpoint_every_steps": 4}
    whole = flashsae.fit(x, run=tmp_path / "run", **settings)
    assert whole.config.normalize_activations == "token_norm"
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert torch.equal(flashsae.load_checkpoint(newest).W_dec, whole.W_dec)
    shutil.rmtree(newest)
    again = flashsae.fit(x, run=tmp_path / "run", resume=True, **settings)
    assert torch.equal(again.W_dec, whole.W_dec)
    assert torch.equal(again(x), whole(x))
    tuned = flashsae.fit(x, init_from=whole, tokens=100, batch_tokens=100, progress=False)
    assert tuned.config == whole.config
    with pytest.raises(ConfigError, match=r"normalize_activations token_norm\. Ask for such a one"):
        flashsae.fit(x, init_from=whole, tokens=100, batch_tokens=100, progress=False, normalize_activations="none")
    settings |= {"tokens": 100, "normalize_activations": "layer_norm"}
    with pytest.raises(ConfigError, match=r"normalize_activations other than layer_norm\. Ask for such a one"):
        flashsae.fit(x, init_from=whole.normalizing("none"), **settings)

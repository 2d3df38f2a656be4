"""A mean far from 0 that is not subtracted by b_dec: subtracted in training, and taken over by biases behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, Architecture, SAEConfig
from flashsae.architecture import X_MEAN, Parameter, settings_of
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.architectures.topk import TopKSettings
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import FlashSAEWarning
from flashsae.sae.centring import center, center_again, recentered
from helpers.resumed import same_after_a_kill

D_IN, D_OUT, D_SAE = 16, 10, 48
OWN: dict[str, dict[str, Any]] = {
    "transcoder": {"k": 4},
    "skip_transcoder": {"k": 4},
    "skip_transcoder:gated": {},
    "transcoder:jump_relu": {"target_l0": 4.0},
    "crosscoder": {"k": 4},
}


def _tokens(arch: str, mean: float, tokens: int = 3000) -> dict[str, Tensor]:
    x = SuperpositionModel(D_IN, 40, active=3.0, noise=0.02).sample(tokens, seed=0)
    matrix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(1)) / 4
    names = ("a", "b") if arch.startswith("crosscoder") else ("in", "out")
    return dict(zip(names, (x + mean, (x @ matrix).relu())))


def _fit(arch: str, mean: float, steps: int = 100, **settings: Any) -> tuple[SAE, dict[str, Tensor]]:
    x = _tokens(arch, mean)
    given = {"tokens": 256 * steps, "batch_tokens": 256, "d_sae": D_SAE, "progress": False, **OWN[arch], **settings}
    return flashsae.fit(x, arch=arch, **given), x


@pytest.mark.parametrize("normalize", ["power_of_two", "none", "mean_square"])
@pytest.mark.parametrize("arch", ["transcoder", "crosscoder"])
def test_a_mean_of_300_costs_nothing(arch: str, normalize: Any) -> None:
    found = {mean: flashsae.evaluate(*_fit(arch, mean, normalize_activations=normalize)) for mean in (3.0, 300.0)}
    assert found[300.0].fvu < 1.1 * found[3.0].fvu < 0.5  # 1.0, and all latents dead, where nothing is subtracted
    assert found[300.0].l0 == pytest.approx(4, rel=0.1)


def test_a_site_with_a_long_mean_weighs_as_much_as_others() -> None:
    found = {mean: flashsae.evaluate(*_fit("crosscoder", mean)).site_fvu["a"] for mean in (0.0, 30.0)}
    assert found[30.0] < 1.2 * found[0.0] < 0.6  # 0.68 where its mean is in what it is scaled by


@dataclass(frozen=True)
class _OwnSettings(TopKSettings):
    """Settings of somebody's own transcoder."""


def _own_transcoder(*rows: Parameter, initialize: Any = None) -> Architecture:
    table = tuple(replace(row, initial="unit_rows") if row.name == "W_enc_T" else row for row in TOPK.parameters)
    changes: dict[str, Any] = {"name": "own", "settings": _OwnSettings, "parameters": (*table, *rows)}
    changes |= {"reads": ("in",), "writes": ("out",), "subtracts_b_dec": False, "initialize": initialize}
    return flashsae.register(replace(TOPK, **changes))


def test_an_architecture_of_somebodys_own_may_be_centred_or_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OWN, "own", {"k": 4})
    _own_transcoder()
    with pytest.warns(FlashSAEWarning, match=r"ends without an active latent.*or subtract the mean of the activations"):
        _fit("own", 300.0)

    def start(sae: SAE, x: Tensor, target: Tensor) -> None:
        center(sae, x)
        flashsae.sae.initialize(sae, x, target)

    _own_transcoder(X_MEAN, initialize=start)
    assert flashsae.evaluate(*_fit("own", 300.0)).fvu < 0.3


@pytest.mark.parametrize("arch", OWN)
def test_biases_take_over_what_was_subtracted(arch: str) -> None:
    own = {**OWN[arch], **({"sites": ("a", "b"), "widths": (9, 7)} if arch == "crosscoder" else {})}
    d_out = D_IN if arch == "crosscoder" else D_OUT
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=settings_of(arch, **own), d_out=d_out), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).abs() / 4)
    x = torch.randn(200, D_IN, generator=generator, dtype=torch.float64) + 5
    before = sae(x)
    centred = recentered(sae, x.mean(0))
    assert centred.centres
    torch.testing.assert_close(centred.b_pre, x.mean(0))
    torch.testing.assert_close(centred(x), before)
    assert not torch.equal(centred.b_enc, sae.b_enc)
    assert sae.b_pre is None
    torch.testing.assert_close(recentered(centred, None).state_dict(), sae.state_dict())
    center_again(sae, x)
    torch.testing.assert_close(sae.state_dict(), centred.state_dict())


@pytest.mark.parametrize("arch", ["skip_transcoder:gated", "crosscoder"])
def test_what_comes_of_a_training_subtracts_nothing(arch: str, tmp_path: Path) -> None:
    sae, x = _fit(arch, 30.0, 20)
    assert sae.b_pre is None
    assert not sae.x_mean.any()
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    of = torch.cat(list(x.values()), 1) if arch == "crosscoder" else x["in"]
    assert torch.equal(loaded(of), sae(of))
    if arch != "crosscoder":  # whose running threshold one step moves
        again = _fit(arch, 30.0, 1, init_from=sae, lr=1e-9)[0]
        torch.testing.assert_close(again(of), sae(of), rtol=1e-2, atol=1e-2)


def test_an_sae_in_training_is_saved_as_one_that_subtracts_nothing(tmp_path: Path) -> None:
    x = _tokens("skip_transcoder", 30.0)
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=settings_of("skip_transcoder", k=4), d_out=D_OUT), dtype=torch.float64)
    sae.initialize_from(x["in"].double(), x["out"].double())
    assert sae.centres
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert not loaded.centres
    torch.testing.assert_close(loaded(x["in"]), sae.eval()(x["in"]))
    other = SAE(sae.config, dtype=torch.float64)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other(x["in"]), sae(x["in"]))


def test_a_short_mean_is_left_to_b_enc() -> None:
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=settings_of("transcoder", k=4), d_out=D_OUT))
    x = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        center(sae, x)
    assert (sae.b_pre, bool(sae.x_mean.any())) == (None, False)
    torch.testing.assert_close(sae.b_enc.detach(), -(sae.W_enc_T @ x.mean(0)).detach())


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"checkpoint_every_steps": 10, "dead_after_tokens": 640, "batch_tokens": 128}
    x = _tokens("skip_transcoder", 30.0)
    arch = settings_of("skip_transcoder", k=4)
    same_after_a_kill(tmp_path, monkeypatch, x=x, d_sae=48, arch=arch, tokens=128 * 35, **settings)

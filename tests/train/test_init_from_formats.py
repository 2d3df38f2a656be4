"""Trainings that go on from SAEs of other libraries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.architecture import settings_of
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats.registry import format_named
from flashsae.sae.saved import content_of
from flashsae.train import init_state
from flashsae.train.init_from import check_saved_start

X = 40 * SuperpositionModel(8, 16, active=2.0).sample(640, seed=1) + 3
FEW: dict[str, Any] = {"tokens": 128, "batch_tokens": 64, "progress": False}


@pytest.fixture(scope="module")
def trained() -> SAE:
    return flashsae.fit(X, d_sae=16, k=3, tokens=640, batch_tokens=64, progress=False)


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "llamascopium"])
def test_a_folder_of_any_format_is_a_start(name: str, trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path / "theirs", format=name, metadata={"model": "gpt2", "hookpoint": "h.3"})
    tuned = flashsae.fit(X, init_from=tmp_path / "theirs", lr=1e-12, **FEW)
    assert (tuned.config.architecture.name, tuned.config.d_sae, tuned.config.k) == ("topk", 16, 3)
    assert tuned.config.apply_b_dec_to_input == flashsae.load(tmp_path / "theirs").config.apply_b_dec_to_input
    torch.testing.assert_close(tuned(X), trained(X), rtol=1e-3, atol=1e-3)
    whole = flashsae.fit(X, init_from=tmp_path / "theirs", run=tmp_path / "run", **FEW)
    with pytest.raises(ConfigError, match=r"init_from: expected an SAE like the one that is asked for, .* d_sae 16"):
        check_saved_start(TrainConfig(32, k=3, init_from=tmp_path / "theirs"))
    assert torch.equal(flashsae.load_checkpoint(tmp_path / "run").W_dec, whole.W_dec)


def state_of(start: SAE, **settings: Any) -> Any:
    source = ArraySource(X)
    config = TrainConfig(start.config.d_sae, arch=start.config.arch, tokens=128, batch_tokens=64, **settings)
    return init_state(config.resolve(source.widths), RowShuffle(source, 64, seed=0), torch.device("cpu"), start=start)


def without(content: Any, *names: str) -> Any:
    return replace(content, tensors={name: value for name, value in content.tensors.items() if name not in names})


def test_the_unit_of_thresholds_that_no_other_library_has_is_measured() -> None:
    arch = settings_of("jump_relu", target_l0=3)
    ours = flashsae.fit(X, d_sae=16, arch=arch, tokens=640, batch_tokens=64, progress=False)
    theirs = flashsae.sae.saved.sae_of(without(content_of(ours), "unit"))
    assert theirs.unit == 1.0
    known, begun = state_of(ours), state_of(theirs)
    measured = flashsae.fit(X, d_sae=16, arch=arch, tokens=64, batch_tokens=64, progress=False).unit
    torch.testing.assert_close(begun.current_sae().unit, measured, rtol=1e-5, atol=0.0)
    assert torch.equal(known.sae.threshold, begun.sae.threshold)
    torch.testing.assert_close(begun.current_sae()(X), theirs(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["relu", "jump_relu", "gated"])
def test_rows_of_any_norm_become_unit_rows_where_each_latent_is_active_by_itself(name: str) -> None:
    settings = settings_of(name, target_l0=3) if name == "jump_relu" else settings_of(name)
    theirs = SAE(SAEConfig(8, 16, arch=settings), seed=3).eval()
    with torch.no_grad():
        theirs.W_dec.mul_(torch.linspace(0.3, 4.0, 16)[:, None])
        theirs.b_enc.add_(0.1)
        if name == "jump_relu":
            theirs.threshold.fill_(0.5)
        if name == "gated":
            theirs.r_mag.uniform_(-0.5, 0.5)
            theirs.b_mag.fill_(0.2)
    begun = state_of(theirs)
    torch.testing.assert_close(begun.sae.W_dec.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(begun.current_sae()(X), theirs(X), rtol=1e-4, atol=1e-3)
    topk = SAE(SAEConfig(8, 16, 3))
    topk.W_dec.data.mul_(torch.linspace(0.3, 4.0, 16)[:, None])
    with pytest.raises(ConfigError, match=r"init_from: expected rows of W_dec of norm 1, which training keeps"):
        state_of(topk)


def test_one_of_several_is_named_and_the_hub_is_fetched_first(trained: SAE, tmp_path: Path) -> None:
    for number in range(2):
        trained.save(tmp_path / "several" / f"h.{number}")
    with pytest.raises(CheckpointError, match=r"several holds 2 SAEs: h.0, h.1\. Name one of them"):
        flashsae.fit(X, init_from=tmp_path / "several", **FEW)
    assert flashsae.fit(X, init_from=tmp_path / "several" / "h.1", **FEW).config == trained.config
    with pytest.raises(
        ConfigError, match=r"^init_from: expected a path on this machine, .* the hub flashsae convert fetches SAEs"
    ):
        TrainConfig(16, init_from="hf://me/mine")
    assert format_named("saelens").write is not None


def test_an_sae_of_another_library_is_measured_as_ours(trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path / "theirs", format="saelens", metadata={"model": "gpt2", "hookpoint": "h.3"})
    theirs = flashsae.load(tmp_path / "theirs")
    assert flashsae.evaluate(theirs, X).fvu == flashsae.evaluate(trained, X).fvu

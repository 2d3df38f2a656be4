"""Architectures that are made of another one, named outer:inner."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import flashsae
from flashsae.architecture import (
    Architecture,
    Progress,
    architecture_named,
    architecture_names,
    architecture_of,
    composed_name,
    composed_settings,
    description,
    settings_of,
)
from flashsae.cli.options import _help
from flashsae.errors import ConfigError
from flashsae.sae import SAE, SAEConfig
from flashsae.settings.kinds import PositiveFloat


def _compose(base: Architecture) -> Architecture:
    name = composed_name("louder", base, "topk")
    doc = "gain: What the values are multiplied by."
    settings = composed_settings(name, base.settings, doc, gain=(PositiveFloat, 2.0))

    def encode(sae: Any, x: torch.Tensor) -> Any:
        code = base.encode(sae, x)
        return code.replace(code.acts * sae.now["gain"].to(code.acts.dtype))

    def schedule(config: SAEConfig, progress: Progress) -> dict[str, float]:
        return {"gain": 1 + (config.arch.gain - 1) * progress.fraction}

    title = f"Louder {base.title}"
    return replace(base, name=name, title=title, settings=settings, encode=encode, schedule=schedule)


@pytest.fixture(autouse=True)
def louder(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashsae.architectures.louder")
    module.BASE, module.compose = "topk", _compose  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = description._ours()
    monkeypatch.setattr(description, "_ours", lambda: [*ours, "louder"])


def test_a_composed_architecture_is_found_by_both_its_names() -> None:
    plain, other = architecture_named("louder"), architecture_named("louder:batch_topk")
    assert architecture_named("louder:topk") is plain
    assert (plain.name, other.name) == ("louder", "louder:batch_topk")
    assert (plain.title, other.title) == ("Louder TopK", "Louder BatchTopK")
    assert architecture_named("louder:louder:batch_topk").title == "Louder Louder BatchTopK"
    assert flashsae.LouderSettings is plain.settings


def test_its_settings_are_those_of_both() -> None:
    settings = settings_of("louder:batch_topk", k=3, gain=1.5)
    assert repr(settings) == "LouderBatchTopKSettings(k=3, gain=1.5)"
    assert architecture_of(settings) is architecture_named("louder:batch_topk")
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ConfigError, match="gain: expected"):
        settings_of("louder:batch_topk", gain=-1.0)
    with pytest.raises(ConfigError, match="kay: louder:batch_topk has no such setting"):
        settings_of("louder:batch_topk", kay=1)
    shown = _help(type(settings))
    assert "k: Latents active" in shown
    assert "gain: What the values" in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topk:topk", "topk is not made of another architecture; leave out :topk"),
        ("louder:other", "expected one of"),
        ("louder:", "expected one of"),
        ("other:topk", "expected one of"),
    ],
)
def test_what_cannot_be_composed_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture_named(name)


def test_it_is_trained_saved_and_loaded(tmp_path: Any, generator: torch.Generator) -> None:
    x = torch.randn(300, 6, generator=generator)
    config = flashsae.TrainConfig(tokens=600, batch_tokens=100)
    sae = flashsae.fit(x, d_sae=16, k=2, arch="louder:batch_topk", config=config, progress=False)
    assert sae.now["gain"] == 2.0  # of the end
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))
    assert torch.equal(pickle.loads(pickle.dumps(sae))(x), sae(x))


def test_what_is_scheduled_follows_the_steps_in_place() -> None:
    sae = SAE(SAEConfig(6, 16, arch=settings_of("louder", k=2)))
    gain = sae.now["gain"]
    assert gain == 2.0
    sae.set_progress(Progress(1, 4))
    assert gain == 1.25
    assert sae.now["gain"] is gain
    assert sae.to("meta").now["gain"].device.type == "meta"


def test_what_was_made_of_ours_is_not_among_the_names() -> None:
    before = architecture_names(installed=False)
    assert architecture_named("transcoder:relu").name == "transcoder:relu"
    assert architecture_names(installed=False) == before

"""How architectures are found by their names."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from flashsae import TrainConfig
from flashsae.architecture import (
    Architecture,
    Parameter,
    architecture_named,
    architecture_names,
    architecture_of,
    description,
)
from flashsae.errors import ConfigError


@dataclass(frozen=True)
class Packaged:
    """Settings of an architecture that a package brings."""

    k: int = 3


MADE = replace(architecture_named("topk"), name="packaged", settings=Packaged)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package that is installed and not imported: its entry points, in the group of architectures."""
    module = ModuleType("a_package")
    module.MADE = MADE  # type: ignore[attr-defined]
    module.OTHER = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_package", module)
    monkeypatch.setattr(Packaged, "__module__", "a_package")
    entries = [
        EntryPoint("packaged", "a_package:MADE", "flashsae.architectures"),
        EntryPoint("renamed", "a_package:MADE", "flashsae.architectures"),
        EntryPoint("other", "a_package:OTHER", "flashsae.architectures"),
        EntryPoint("gone", "a_package.gone:MADE", "flashsae.architectures"),
    ]
    monkeypatch.setattr(description, "entry_points", lambda group: entries if group == entries[0].group else [])
    monkeypatch.setattr(description, "_REGISTERED", dict(description._REGISTERED))
    return module


@pytest.mark.usefixtures("package")
def test_an_architecture_of_an_installed_package_is_found_by_its_name_and_by_its_settings() -> None:
    assert {"packaged", "topk", "batch_topk"} <= set(architecture_names())
    assert "packaged" not in architecture_names(installed=False)
    assert TrainConfig(arch="packaged", k=5).arch == Packaged(5)
    assert architecture_of(Packaged()) is architecture_named("packaged") is MADE


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("renamed", "arch: expected a_package:MADE to be an Architecture named 'renamed', got Architecture"),
        ("other", "arch: expected a_package:OTHER to be an Architecture named 'other', got 3"),
        ("gone", r"arch: 'gone' cannot be loaded from a_package.gone:MADE \(ModuleNotFoundError: .*\)\. Repair or"),
        ("nowhere", "arch: expected one of .*gone, .*other, packaged, .*renamed, .*topk.*, got 'nowhere'"),
    ],
)
def test_a_package_whose_architecture_cannot_be_had_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(arch=name)


@pytest.mark.usefixtures("package")
def test_settings_of_no_architecture_load_no_package() -> None:
    with pytest.raises(ConfigError, match=r"arch: expected settings of an architecture, such as .*, got 3"):
        architecture_of(3)


def test_our_own_are_found_without_looking_at_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "entry_points", lambda group: pytest.fail("looked for packages"))
    assert isinstance(architecture_named("batch_topk"), Architecture)
    assert architecture_of(TrainConfig().arch).name == "topk"


def test_two_parameters_of_one_name_are_refused_however_they_differ() -> None:
    topk = architecture_named("topk")
    twice = replace(topk, parameters=(*topk.parameters, Parameter("b_dec", (), "another one", trained=False)))
    with pytest.raises(ConfigError, match="parameters of topk: expected each name once, got b_dec again"):
        description.register(twice)

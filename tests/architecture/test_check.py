from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass, replace
from typing import Any

import pytest

import flashsae
from flashsae import SAE, Architecture, Parameter, SAEConfig, Term, TrainConfig
from flashsae.architecture import AUTOENCODER, RECONSTRUCTION
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.errors import ConfigError


@dataclass(frozen=True)
class OddSettings:
    """Settings of an architecture that something is odd about."""

    k: int = 3


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(architectures._REGISTERED)
    yield
    architectures._REGISTERED.clear()
    architectures._REGISTERED.update(before)


def odd(**parts: Any) -> Architecture:
    return flashsae.register(replace(TOPK, **{"name": "odd", "title": "Odd", "settings": OddSettings, **parts}))


def another(**row: Any) -> tuple[Parameter, ...]:
    return (*AUTOENCODER, Parameter(**{"name": "z", "shape": ("d_sae",), "meaning": "one more", **row}))


REFUSED = [
    ({"name": "my arch"}, r"name: expected letters, digits and _ \. - for an architecture, got 'my arch'"),
    ({"name": ""}, "name: expected letters, digits"),
    ({"settings": make_dataclass("Bare", [("k", int)], frozen=True)}, "odd: expected a default for each, but k has"),
    ({"terms": ()}, "terms of odd: expected at least one, such as flashsae.architecture.RECONSTRUCTION"),
    ({"terms": (RECONSTRUCTION, RECONSTRUCTION)}, "terms of odd: expected each name once, got fvu again"),
    ({"parameters": AUTOENCODER[:3]}, "expected W_enc_T, b_enc, W_dec, b_dec among them, .* there is no b_dec"),
    (
        {"parameters": tuple(replace(row, trained=False) for row in AUTOENCODER)},
        "expected at least one that is trained",
    ),
    ({"parameters": another(name="a.b")}, r"parameter a\.b of odd: expected a name that an attribute can have"),
    ({"parameters": another(shape=("heads",))}, "parameter z of odd: .* d_in, d_out, d_sae, got 'heads' in it"),
    ({"parameters": another(factored=True)}, r"parameter z of odd: expected two sizes .*, got \['d_sae'\]"),
    ({"parameters": another(saved=False)}, "parameter z of odd: expected trained=False beside saved=False"),
    ({"parameters": another(unit_norm=True)}, "parameter z of odd: expected two sizes"),
    ({"parameters": another(initial="unit_rows")}, "parameter z of odd: expected two sizes"),
    ({"parameters": another(initial="y")}, "parameter z of odd: .* or equal to a parameter that does, got 'y'"),
    ({"parameters": another(initial="W_enc_T")}, "parameter z of odd: .* or equal to a parameter that does"),
]


@pytest.mark.parametrize(("parts", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_an_architecture_is_refused_when_it_is_registered(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        odd(**parts)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "encode"}, "parameter encode: every SAE has an attribute of this name"),
        ({"initial": "W_dec"}, r"parameter z: it starts equal to W_dec, so expected \[5\] .*, got \[5, 4\]"),
    ],
)
def test_parameters_that_no_sae_can_have_are_refused(row: dict[str, Any], message: str) -> None:
    odd(parameters=another(**row))
    with pytest.raises(ConfigError, match=message):
        SAE(SAEConfig(4, 5, arch=OddSettings()))


def test_an_encoder_that_starts_as_a_decoder_of_another_width_is_refused() -> None:
    odd(reads=("before",), writes=("after",))
    with pytest.raises(ConfigError, match=r"parameter W_enc_T: it starts equal to W_dec, .*\[5, 4\].*, got \[5, 6\]"):
        SAE(SAEConfig(4, 5, arch=OddSettings(), d_out=6))


def _term(weight: float | str) -> Term:
    compute: Callable[[Any], Any] = lambda step: step.code.acts.sum()  # noqa: E731
    return Term("more", "Σ acts", "More.", compute, weight=weight)


def test_weights_of_terms_are_looked_up_before_a_training() -> None:
    odd(terms=(RECONSTRUCTION, _term("wieght")))
    with pytest.raises(ConfigError, match="weight of more: expected a setting 'wieght' of the architecture or of a"):
        TrainConfig(arch=OddSettings())
    odd(terms=(replace(RECONSTRUCTION, weight=0.0), _term(0.0)))
    with pytest.raises(ConfigError, match="arch: the terms of the loss of Odd all have the weight 0"):
        TrainConfig(arch=OddSettings())


def test_the_same_lines_may_be_run_again_as_in_a_notebook() -> None:
    first, again = (make_dataclass("Cell", [("k", int, 3)], frozen=True) for _ in range(2))
    odd(settings=first)
    assert odd(settings=again) is architectures.architecture_of(again())


def test_nobody_takes_a_name_of_ours_before_it_is_loaded() -> None:
    code = (
        "import dataclasses, flashsae\n"
        "from flashsae.architectures.topk import ARCHITECTURE\n"
        "Mine = dataclasses.make_dataclass('Mine', [('k', int, 3)], frozen=True)\n"
        "flashsae.register(dataclasses.replace(ARCHITECTURE, name='batch_topk', settings=Mine))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "batch_topk: expected a name and settings of its own, but BatchTopK has this name" in done.stderr

"""What people are told who give other sites than an architecture has: how to give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.architecture import architecture_named, settings_of
from flashsae.architecture.sites import read_and_written, shown_by_site, width_told
from flashsae.errors import ConfigError, FlashSAEError
from flashsae.settings.training import TrainConfig

X, Y = torch.randn(30, 6), torch.randn(30, 4)


@pytest.fixture(scope="module")
def transcoder() -> SAE:
    return SAE(SAEConfig(6, 16, arch=settings_of("transcoder", k=2), d_out=4))


@pytest.fixture(scope="module")
def crosscoder() -> SAE:
    return SAE(SAEConfig(10, 16, arch=settings_of("crosscoder", k=2, sites=("a", "b"), widths=(6, 4))))


def refusal(does: Callable[[], Any]) -> str:
    with pytest.raises(FlashSAEError) as refused:
        does()
    return str(refused.value)


def fit(x: Any, arch: str) -> Any:
    return flashsae.fit(x, arch=arch, d_sae=16, k=2, tokens=20, batch_tokens=10, progress=False)


@pytest.mark.parametrize(
    ("arch", "x", "told"),
    [
        ("transcoder", X, 'fit({"in": x, "out": y}, arch="transcoder"); on the command line --hookpoint h.3.mlp:in'),
        ("skip_transcoder", {"in": X}, 'got those of 1 (in). Give them by name: fit({"in": x, "out": y}, arch="skip'),
        ("transcoder", {"in": X, "out": Y, "z": Y}, 'got those of 3 (in, out, z). Give them by name: fit({"in": x,'),
        ("transcoder", [(X, Y)], 'a dict of in, out, got tuple. Name its entries: {"in": x, "out": y}.'),
        ("crosscoder", X, 'fit({"layer 3": x, "layer 6": y}, arch="crosscoder"); on the command line --hookpoint h.3 '),
        ("crosscoder:topk", {"a": X}, 'got those of 1 (a). Give them by name: fit({"layer 3": x, "layer 6": y}, arch='),
        ("crosscoder", [X], 'expected a dict of activations by site, got Tensor. Name its entries: {"layer 3": x, "'),
        ("topk", {"a": X, "b": Y}, 'of one site, got those of 2 (a, b). Give one: fit(x["a"], arch="topk"); or take'),
        ("topk", [{"a": X, "b": Y}], "Choose one: (batch['a'] for batch in x)."),
    ],
)
def test_a_training_tells_how_to_give_sites(arch: str, x: Any, told: str) -> None:
    assert told in refusal(lambda: fit(x, arch))


@pytest.mark.parametrize("x", [X, {"in": X}, [X], [(X, Y)], {"in": X, "out": Y, "z": Y}])
def test_an_evaluation_tells_how_to_give_sites(x: Any, transcoder: SAE, crosscoder: SAE) -> None:
    told = refusal(lambda: flashsae.evaluate(transcoder, x))
    assert told.endswith('Give them by name: evaluate(sae, {"in": x, "out": y}).')
    told = refusal(lambda: flashsae.evaluate(crosscoder, x))
    assert '{"a": x, "b": y}' in told
    assert "fit(" not in told


def test_sites_of_other_widths_are_told_by_name(transcoder: SAE, crosscoder: SAE) -> None:
    told = refusal(lambda: flashsae.evaluate(transcoder, {"p": Y, "q": X}))
    assert told.startswith("x: expected the sites in of 6, out of 4, got p of 4, q of 6. Give them by these names, or")
    told = refusal(lambda: flashsae.evaluate(crosscoder, {"b": X, "a": Y}))
    assert told.startswith("x: expected the sites a of 6, b of 4, got a of 4, b of 6.")
    assert flashsae.evaluate(transcoder, {"out": Y, "in": X}).tokens == 30


def test_a_dict_is_no_tensor_but_is_made_one(transcoder: SAE, crosscoder: SAE) -> None:
    batch: Any = {"a": X, "b": Y}
    assert refusal(lambda: crosscoder.encode(batch)).endswith("torch.cat([x['a'], x['b']], -1).")
    assert refusal(lambda: transcoder.encode({"in": X, "out": Y})).endswith("x['in'].")  # type: ignore[arg-type]
    assert (
        refusal(lambda: crosscoder(X)) == "x: expected the shape [..., 10], 6 of a and 4 of b beside each other, "
        "got [30, 6]."
    )


def test_any_number_of_sites_can_be_shown() -> None:
    assert shown_by_site(["a"]) == '{"a": x}'
    assert shown_by_site([str(place) for place in range(8)]).count(": x") == 2
    with pytest.raises(ConfigError, match=r"got those of 0 \(none\)"):
        read_and_written(architecture_named("crosscoder"), [])
    with pytest.raises(ConfigError, match=r"got those of 0 \(none\)\. Give one: fit\(x, arch="):
        read_and_written(architecture_named("topk"), [])


def test_widths_of_sites_are_told_one_by_one() -> None:
    assert width_told([384, 384, 1256]) == "384 + 384 + 1,256"
    assert width_told([384] * 12) == "12 x 384"
    assert width_told([]) == ""
    config = TrainConfig(arch="crosscoder", tokens=2000)
    assert config.resolve({"a": 384, "b": 384, "c": 256}).described_widths == "d_in 384 + 384 + 256"
    assert TrainConfig(arch="transcoder").resolve({"in": 384, "out": 1536}).described_widths == "d_in 384, d_out 1,536"
    assert TrainConfig().resolve(384).described_widths == "d_in 384"

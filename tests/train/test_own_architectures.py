"""Architectures from outside the package, in `fit`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig, Term, TrainConfig
from flashsae.architecture import AUTOENCODER, RECONSTRUCTION
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError, DtypeError, FlashSAEWarning, ShapeError
from flashsae.settings.kinds import check_fields

SMALL = TrainConfig(batch_tokens=64, tokens=64 * 12, checkpoint_every_steps=5, shuffle_tokens=256)
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
Y = X @ torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class TranscoderSettings:
    """Settings of a transcoder, which has no setting k."""

    active: int = 3


@dataclass(frozen=True)
class ListSettings:
    """Settings of which one is a list, and one a path."""

    k: int = 3
    groups: tuple[int, ...] = (4, 16)
    words: Path = Path("words.txt")
    __post_init__ = check_fields


@dataclass(frozen=True)
class RoomSettings:
    """Settings of codes with a capacity."""

    capacity: int = 40


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    rows = {row.name: row for row in AUTOENCODER}
    flashsae.register(
        replace(
            TOPK,
            name="own_transcoder",
            title="Transcoder",
            settings=TranscoderSettings,
            parameters=tuple({**rows, "W_enc_T": replace(rows["W_enc_T"], initial="unit_rows")}.values()),
            encode=lambda sae, x: flashsae.ops.encode_topk(x, sae.W_enc_T, sae.b_enc, sae.config.arch.active),
            terms=(RECONSTRUCTION,),
            l0=lambda settings: settings.active,
            most=None,
            reads=("before",),
            writes=("after",),
            subtracts_b_dec=False,
        )
    )
    flashsae.register(replace(TOPK, name="listed", title="Listed", settings=ListSettings))
    flashsae.register(
        replace(
            TOPK,
            name="room",
            title="Room",
            settings=RoomSettings,
            encode=lambda sae, x: flashsae.ops.encode_above(
                x, sae.W_enc_T, sae.b_enc, 0.0, capacity=sae.config.arch.capacity, b_dec=sae.b_dec
            ),
            l0=lambda settings: settings.capacity / 64,
            most=None,
        )
    )
    yield
    for name in ("own_transcoder", "listed", "room"):
        architectures._REGISTERED.pop(name)


def fitted(x: object) -> SAE:
    return flashsae.fit(x, d_sae=16, arch="own_transcoder", config=SMALL, progress=False)  # type: ignore[arg-type]


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_sites_are_found_by_their_names_in_any_order() -> None:
    expected = fitted({"before": X, "after": Y})
    assert (expected.config.d_in, expected.config.d_out) == (8, 6)
    assert same(fitted({"after": Y, "before": X}), expected)
    assert same(fitted({"layers.3:in": X, "layers.3": Y}), expected)  # of other names, the order tells
    fvu = flashsae.evaluate(expected, {"before": X, "after": Y}).fvu
    assert flashsae.evaluate(expected, {"after": Y, "before": X}).fvu == fvu


def test_batches_of_several_sites_are_trained_on() -> None:
    batches = [{"ids": x, "after": y, "before": x} for x, y in zip(torch.split(X, 100), torch.split(Y, 100))]
    assert same(fitted(batches), fitted(iter([*batches, *batches])))
    with pytest.raises(DtypeError, match="expected a dict of before, after, got Tensor"):
        fitted([X])
    named = [{"h.3:in": batch["before"], "h.3": batch["after"]} for batch in batches]
    assert same(fitted(named), fitted(batches))
    with pytest.raises(DtypeError, match="expected a dict of before, after, got a dict of x, y, z"):
        fitted([{"x": X, "y": Y, "z": Y}])


def test_k_is_not_taken_for_that_of_another_architecture() -> None:
    config = replace(SMALL, arch=TranscoderSettings())
    with pytest.raises(ConfigError, match="k: own_transcoder, the arch of config, has no such setting"):
        flashsae.fit({"before": X, "after": Y}, d_sae=16, k=3, config=config, progress=False)


def test_a_training_whose_settings_hold_a_list_and_a_path_is_resumed(tmp_path: Path) -> None:
    runs = [
        flashsae.fit(X, d_sae=16, arch=ListSettings(), config=SMALL, run=tmp_path / "a", resume=resume, progress=False)
        for resume in (False, True)
    ]
    assert same(*runs)
    runs[0].save(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").config.arch == ListSettings()


@pytest.mark.parametrize(("value", "got"), [(0.5, "0.5"), (torch.ones(3), r"\[3\]")])
def test_a_term_that_is_no_scalar_is_refused(value: object, got: str) -> None:
    term = Term("odd", "?", "Odd.", lambda step: value)  # type: ignore[arg-type, return-value]
    flashsae.register(replace(TOPK, name="listed", settings=ListSettings, terms=(RECONSTRUCTION, term)))
    with pytest.raises(ShapeError, match=f"term odd: expected a scalar tensor, or None, got {got}"):
        flashsae.fit(X, d_sae=16, arch=ListSettings(), config=SMALL, progress=False)


@pytest.mark.parametrize("capacity", [40, 64 * 16])
def test_codes_without_room_for_all_are_told_of_once(capacity: int, tmp_path: Path) -> None:
    told = (
        pytest.warns(FlashSAEWarning, match="entries of the code found no place") if capacity == 40 else nullcontext()
    )
    with told as warnings:
        arch = RoomSettings(capacity)
        flashsae.fit(X, d_sae=16, arch=arch, config=SMALL, run=tmp_path / "run", progress=False)
    assert capacity > 40 or (warnings is not None and len(warnings) == 1)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert (last["left_out"] > 0) == (capacity == 40)
    assert last["l0"] <= capacity / 64


def test_an_evaluation_tells_of_entries_that_found_no_place() -> None:
    sae = SAE(SAEConfig(8, 16, arch=RoomSettings(40)))
    with pytest.warns(FlashSAEWarning, match="in inference, let Room encode without a capacity"):
        few = flashsae.evaluate(sae, X)
    assert few.l0 < flashsae.evaluate(SAE(SAEConfig(8, 16, arch=RoomSettings(640 * 16))), X).l0

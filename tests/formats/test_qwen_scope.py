from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError
from flashsae.formats.qwen_scope import FORMAT
from flashsae.formats.registry import recognised
from helpers.released import D, F, assert_computes, normal

REPOSITORY = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
X = normal(19, D)
WEIGHTS = {"W_enc": normal(F, D), "W_dec": normal(D, F, seed=1), "b_enc": normal(F, seed=2), "b_dec": normal(D, seed=3)}


def published(k: int, weights: dict[str, Tensor] = WEIGHTS) -> tuple[Tensor, Tensor]:
    """Return codes and reconstruction in float64."""
    w = {name: weight.double() for name, weight in weights.items()}
    pre_acts = X.double() @ w["W_enc"].T + w["b_enc"]
    top = pre_acts.topk(k, dim=1)
    codes = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    return codes, codes @ w["W_dec"].T + w["b_dec"]


def made(root: Path, place: str = REPOSITORY, layer: int = 3, **weights: Any) -> Path:
    """Write the file of a layer, and return it; None leaves a tensor out."""
    file = root / place / f"layer{layer}.sae.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in (WEIGHTS | weights).items() if value is not None}, file)
    return file


def test_what_is_read_computes_what_was_published(tmp_path: Path) -> None:
    file = made(tmp_path)
    assert_computes(file, X, *published(4))
    assert_computes(file.parent, X, *published(4))
    assert recognised(file) is recognised(file.parent) is FORMAT
    content = FORMAT.read(file)
    assert (content.architecture, content.settings, content.apply_b_dec_to_input) == ("topk", {"k": 4}, False)
    assert content.metadata == {"model": "Qwen/Qwen3-1.7B-Base", "hookpoint": "layers.3"}
    assert content.tensors["W_dec"].is_contiguous()


@pytest.mark.parametrize(
    ("place", "k", "model"),
    [
        ("models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_7/snapshots/1a2b", 7, "Qwen/Qwen3-8B-Base"),
        ("SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_10/more", 10, "Qwen/Qwen3.5-35B-A3B-Base"),
        ("mine-L0_5", 5, None),
    ],
)
def test_the_folder_tells_k_and_the_model(tmp_path: Path, place: str, k: int, model: str | None) -> None:
    content = FORMAT.read(made(tmp_path, place, layer=27))
    assert content.settings == {"k": k}
    assert content.metadata == {"hookpoint": "layers.27"} | ({"model": model} if model else {})


def test_a_config_beside_it_tells_k_before_the_folder_does(tmp_path: Path) -> None:
    for place in ("mine", REPOSITORY):
        file = made(tmp_path, place)
        (file.parent / "config.json").write_text(json.dumps({"k": 6, "other": []}), "utf-8")
        assert_computes(file, X, *published(6))
    (file.parent / "config.json").write_text("{}", "utf-8")
    assert FORMAT.read(file).settings == {"k": 4}


def test_where_nobody_tells_k_it_says_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"layer3.sae.pt does not say .* ends with -L0_50 .* with {\"k\": 50} bes"
    ):
        flashsae.load(made(tmp_path, "mine"))


@pytest.mark.parametrize("k", [0, F + 1, "four"])
def test_no_k_that_cannot_be_is_taken(tmp_path: Path, k: Any) -> None:
    file = made(tmp_path, "mine")
    (file.parent / "config.json").write_text(json.dumps({"k": k}), "utf-8")
    told = "has 40 latents, and by its folder or config.json 41 of them" if k == F + 1 else "k: expected a"
    with pytest.raises(CheckpointError, match=told):
        flashsae.load(file)


def test_a_folder_of_layers_is_told_by_its_hookpoints(tmp_path: Path) -> None:
    for layer in (10, 2, 0):
        folder = made(tmp_path, layer=layer, b_dec=torch.full((D,), float(layer))).parent
    assert list(FORMAT.parts(folder)) == ["layers.0", "layers.2", "layers.10"]  # type: ignore[misc]
    assert flashsae.load(folder / "layers.10").b_dec[0] == 10
    assert flashsae.load(folder / "layer2.sae.pt").b_dec[0] == 2
    for read in (flashsae.load, FORMAT.read):
        with pytest.raises(CheckpointError, match=r"holds (3 SAEs: layers.0|SAEs of 3 layers: name the file of one)"):
            read(folder)
    with pytest.raises(CheckpointError, match=r"holds no layer0.sae.pt or the like: name the file"):
        FORMAT.read(tmp_path)


def test_as_many_latents_as_inputs_are_not_transposed(tmp_path: Path) -> None:
    square = {
        "W_enc": normal(D, D),
        "W_dec": normal(D, D, seed=1),
        "b_enc": normal(D, seed=2),
        "b_dec": WEIGHTS["b_dec"],
    }
    assert_computes(made(tmp_path, **square), X, *published(4, square))


WRONG = {
    "missing": ({"W_dec": None}, "it has no W_dec; expected W_dec, W_enc, b_dec, b_enc"),
    "strange": ({"gate": torch.zeros(3)}, "gate is none of its tensors"),
    "transposed": ({"W_dec": WEIGHTS["W_dec"].T}, r"W_dec: expected floats \[6, 40\], got float32 \[40, 6\]"),
    "scalar": ({"b_enc": torch.tensor(1.0)}, r"b_enc: expected floats \[any\]"),
    "whole numbers": ({"b_dec": torch.arange(D)}, "b_dec: expected floats .*, got int64"),
    "no number": ({"W_enc": WEIGHTS["W_enc"] * float("nan")}, "W_enc holds values that are infinite or no numbers"),
}


@pytest.mark.parametrize(("weights", "told"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told(tmp_path: Path, weights: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        flashsae.load(made(tmp_path, **weights))


class Runs:
    """Runs something when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


def test_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer3.sae.pt is not read"):
        flashsae.load(made(tmp_path, extra=Runs()))
    assert not Path("ran").exists()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    file = made(tmp_path)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no pickle"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"layer3.sae.pt"):
            flashsae.load(file)


def test_half_precision_stays(tmp_path: Path) -> None:
    half = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    assert flashsae.load(made(tmp_path, **half)).W_dec.dtype == torch.bfloat16


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "layer1.sae.pt").mkdir()
    (tmp_path / "layerx.sae.pt").touch()
    for place in (tmp_path / "layerx.sae.pt", tmp_path / "layer0.sae.pt", tmp_path / ("x" * 300), tmp_path / "none"):
        assert not FORMAT.detects(place)

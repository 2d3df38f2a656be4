from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError
from flashsae.formats.goodfire import FORMAT
from flashsae.formats.registry import recognised
from helpers.released import D, F, assert_computes, normal

NAME = "Llama-3.3-70B-Instruct-SAE-l50.pt"
X = normal(19, D)
WEIGHTS = {
    "encoder_linear.weight": normal(F, D), "encoder_linear.bias": normal(F, seed=1),
    "decoder_linear.weight": normal(D, F, seed=2), "decoder_linear.bias": normal(D, seed=3),
}  # fmt: skip


def published() -> tuple[Tensor, Tensor]:
    """Return codes and reconstruction in float64."""
    w = {name: weight.double() for name, weight in WEIGHTS.items()}
    codes = torch.relu(torch.nn.functional.linear(X.double(), w["encoder_linear.weight"], w["encoder_linear.bias"]))
    return codes, torch.nn.functional.linear(codes, w["decoder_linear.weight"], w["decoder_linear.bias"])


def made(root: Path, name: str = NAME, *, is_old: bool = False, **weights: Any) -> Path:
    """Write one, and return its file; None leaves a tensor out, and is_old writes as torch did before version 1.6."""
    file = root / name
    changed = {name.replace("__", "."): value for name, value in weights.items()}
    content = {name: value for name, value in (WEIGHTS | changed).items() if value is not None}
    torch.save(content, file, _use_new_zipfile_serialization=not is_old)
    return file


@pytest.mark.parametrize("is_old", [False, True])
def test_what_is_read_computes_what_was_published(tmp_path: Path, is_old: bool) -> None:
    file = made(tmp_path, is_old=is_old)
    (tmp_path / "other.pt").write_bytes(b"something else")
    assert_computes(file, X, *published())
    assert_computes(tmp_path, X, *published())
    assert recognised(file) is recognised(tmp_path) is FORMAT
    content = FORMAT.read(file)
    assert (content.architecture, content.apply_b_dec_to_input) == ("relu", False)
    assert content.metadata == {"model": "meta-llama/Llama-3.3-70B-Instruct", "hookpoint": "layers.50"}


def test_a_file_of_any_name_is_known_by_its_tensors(tmp_path: Path) -> None:
    assert FORMAT.read(made(tmp_path, "mine.pth")).metadata == {}
    (tmp_path / "mine.pth").rename(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    content = FORMAT.read(tmp_path)
    assert content.metadata == {"model": "meta-llama/Llama-3.1-8B-Instruct", "hookpoint": "layers.19"}
    assert FORMAT.read(made(tmp_path, "a-model-of-mine-SAE-l3.pt")).metadata == {"model": "a-model-of-mine"}


def test_of_several_in_a_folder_one_is_to_be_named(tmp_path: Path) -> None:
    for name in (NAME, "Llama-3.1-8B-Instruct-SAE-l19.pth"):
        made(tmp_path, name)
    with pytest.raises(
        CheckpointError, match=r"expected one file .* found Llama-3.1-8B-.*, Llama-3.3-.*: name the file"
    ):
        flashsae.load(tmp_path)
    with pytest.raises(CheckpointError, match="found none: name the file"):
        FORMAT.read(tmp_path.parent)


WRONG = {
    "missing": ({"decoder_linear__bias": None}, "it has no decoder_linear.bias; expected"),
    "strange": ({"scale": torch.zeros(3)}, "scale is none of its tensors"),
    "transposed": (
        {"decoder_linear__weight": normal(F, D)},
        r"decoder_linear.weight: expected floats \[6, 40\], got float32 \[40, 6\]",
    ),
    "scalar": ({"encoder_linear__bias": torch.tensor(1.0)}, r"encoder_linear.bias: expected floats \[any\]"),
    "no number": ({"decoder_linear__bias": torch.full((D,), float("nan"))}, "holds values that are infinite or no num"),
}


@pytest.mark.parametrize(("weights", "told"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told(tmp_path: Path, weights: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        flashsae.load(made(tmp_path, **weights))


class Runs:
    """Runs something when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


@pytest.mark.parametrize("is_old", [False, True])
def test_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{NAME} is not read"):
        flashsae.load(made(tmp_path, is_old=is_old, extra=Runs()))
    assert not Path("ran").exists()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    file = made(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(CheckpointError, match=NAME):
        flashsae.load(file)
    for content in (b"", b"no pickle"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="holds no SAE of a format that is known"):
            flashsae.load(file)
        with pytest.raises(CheckpointError, match=NAME):
            flashsae.load(file, format="goodfire")


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "ae.pt")
    (tmp_path / "folder.pt").mkdir()
    for place in (tmp_path, tmp_path / "ae.pt", tmp_path / "folder.pt", tmp_path / "none.pt", tmp_path / ("x" * 300)):
        assert not FORMAT.detects(place)

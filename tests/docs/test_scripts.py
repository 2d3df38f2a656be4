"""The examples do what they say, on a small model and an SAE of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import loading, steering

import flashsae
from flashsae.errors import CheckpointError
from helpers.little_model import HOOKPOINT
from helpers.pages import ROOT

COMMANDS = sorted(
    {
        line.strip()
        for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py"))
        for line in file.read_text("utf-8").splitlines()
        if line.strip().startswith("python examples/")
    }
)

pytestmark = pytest.mark.xdist_group("little model")
LOUD = "THE CAT SAT ON THE MAT. THE DOG RAN ON THE HILL. THE PIG HID. THE COW LAY ON THE BARN."


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_written_down_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Understood:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise InterruptedError(name)

    _, script, *arguments = shlex.split(command)
    module = {"steering": steering, "loading": loading}[Path(script).stem]
    monkeypatch.setattr("flashsae.load", lambda place: None)  # first, so that a wrong place is told at once
    monkeypatch.setattr(module, "AutoTokenizer", Understood)
    with pytest.raises(InterruptedError, match="gpt2"):
        module.main(arguments)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 2


def steered(little: tuple[Path, Path], prompt: str) -> dict[str, tuple[float, str]]:
    model, sae = little
    about = [
        "--about",
        LOUD,
        "--unlike",
        LOUD.lower(),
        "--prompt",
        prompt,
        "--new-tokens",
        "12",
        "--strengths",
        "0.5",
        "1",
        "2",
    ]
    rows = steering.main([str(sae), "--model", str(model), "--hookpoint", HOOKPOINT, *about])
    return {row.edit: (row.about, row.text) for row in rows}


def test_steering_says_more_of_what_a_latent_is_about(
    little: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = steered(little, "the dog ")
    strengths = [name for name in rows if name != "ablated"]
    assert strengths == ["as it is", *(f"+ {strength} x maximum" for strength in ("0.5", "1", "2"))]
    shares = [rows[name][0] for name in strengths]
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert shares[-1] > 2 * shares[0] + 0.1
    assert rows["as it is"][1].islower()
    assert not rows["+ 2 x maximum"][1].islower()  # what it writes is another text
    assert "maximum" in capsys.readouterr().out
    rows = steered(little, "THE DOG ")
    assert rows["ablated"][0] < rows["as it is"][0]


def test_loading_and_writing_for_another_library(
    little: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, sae = little
    where = ["--model", str(model), "--hookpoint", HOOKPOINT, "--text", LOUD[:23]]
    found = loading.main([str(sae), *where, "--save", str(tmp_path / "lens")])
    assert found.l0 == pytest.approx(8, abs=1)
    assert abs(found.loss_reconstructed - found.loss) < 0.5
    assert found.loss_ablated > found.loss_reconstructed
    assert {file.name for file in (tmp_path / "lens").iterdir()} >= {"cfg.json", "sae_weights.safetensors"}
    again = loading.main([str(tmp_path / "lens"), *where])
    assert again == pytest.approx(found, rel=1e-5)
    assert f"'{LOUD[1]}'" in capsys.readouterr().out
    x = torch.randn(5, 32)
    assert torch.equal(flashsae.load(tmp_path / "lens")(x), flashsae.load(sae)(x))


@pytest.mark.parametrize("module", [loading, steering])
def test_a_wrong_place_is_told_before_the_model_is_loaded(module: Any, tmp_path: Path) -> None:
    more = ["--about", "a", "--prompt", "b"] if module is steering else []
    with pytest.raises(CheckpointError, match="no such file or folder"):
        module.main([str(tmp_path / "nothing"), "--hookpoint", "h.1", "--model", str(tmp_path / "none"), *more])

"""The help of a command shows the settings of the architecture that is asked for, with its own defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashsae.architecture import architecture_named
from flashsae.cli import main
from flashsae.cli.options import _help, _with_defaults
from flashsae.settings.training import TrainConfig


def shown(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", *words, "--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arch", "default"),
    [
        ("relu", "0 turns it off. Default: 0. --k-aux"),
        ("transcoder:gated", "0 turns it off. Default: 0. --k-aux"),
        ("topk", "0 turns it off. Default: 1 / 32, and 1 with sae_lens. --k-aux"),
        (
            "crosscoder",
            "Number of latents. Default: the next power of two from 8 x the width of the widest site. --arch",
        ),
        ("crosscoder:relu", "scaled activations. Default: mean_square. [choices:"),
        ("jump_relu", "scaled activations. Default: power_of_two. [choices:"),
    ],
)
def test_help_shows_the_defaults_of_the_architecture_that_is_asked_for(
    arch: str, default: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default in shown(["--arch", arch], monkeypatch, capsys)


def test_an_architecture_named_in_a_file_is_asked_for_too(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.toml").write_text('arch = "gated"\n')
    text = shown(["--config", str(tmp_path / "my.toml")], monkeypatch, capsys)
    assert "0 turns it off. Default: 0. --k-aux" in text


def test_a_default_is_said_in_words() -> None:
    def half(config: Any) -> float:
        """Half of what it was.

        More.
        """
        return 0.5 * config.lr

    defaults = {"lr": half, "eps": lambda config: 1.0, "betas": (0.0, 0.999), "warmup_steps": 7, "nothing": 1}
    lines = _help(TrainConfig)
    said = _with_defaults(lines, replace(architecture_named("topk"), defaults=defaults)).splitlines()
    by_name = dict(line.strip().split(": ", 1) for line in said if line.startswith("    ") and line[4] != " ")
    assert by_name["lr"] == "Peak learning rate of Adam. Default: half of what it was."
    assert by_name["eps"].endswith(" Default: worked out from other settings.")
    assert by_name["betas"] == "Decay of the moments of Adam. Default: 0 and 0.999."
    assert by_name["warmup_steps"] == "Steps of rise of the learning rate; no more than there are. Default: 7."
    assert "nothing" not in by_name
    assert list(by_name) == [line.strip().split(": ")[0] for line in lines.splitlines() if line[4:5].strip()]

"""The head of docs/interop.md says which formats there are, and its commands do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae.cli import main
from flashsae.formats.registry import formats
from helpers.pages import ROOT

PAGE = (ROOT / "docs" / "interop.md").read_text("utf-8")
HEAD = PAGE.split("\n## ", 2)


def test_the_table_is_what_the_registry_has() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", HEAD[0], re.MULTILINE)
    wanted = [
        (name, form.title, "read" if form.write is None else "read and written") for name, form in formats().items()
    ]
    assert rows == wanted


def test_options_name_every_format_that_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("convert", "train"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for name, form in formats().items():
            if form.write is not None and (name != "flashsae" or command == "convert"):
                assert re.search(rf"\b{name}\b", told), (command, name)


def test_its_code_and_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = flashsae.SAE(flashsae.SAEConfig(8, 32, 4))
    start.save("runs/mine/sae", metadata={"model": "gpt2", "hookpoint": "h.6"})
    names = {"flashsae": flashsae}
    exec(re.findall(r"```python\n(.*?)```", HEAD[1], re.DOTALL)[0], names)
    commands = re.findall(r"^flashsae (.*)$", HEAD[1], re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        if command.startswith("convert"):  # the training is one of minutes, and has tests of its own
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(command))
            assert not ended.value.code
    x = torch.randn(10, 8)
    for sae in (names["again"], flashsae.load("back"), flashsae.load("mine-for-sae-lens")):
        assert torch.equal(sae(x), start(x))

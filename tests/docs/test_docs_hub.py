"""What docs/interop.md says of the hub: its Python and its commands are run, against a stand-in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import flashsae
from flashsae.cli import main
from helpers import hub as stand_in
from helpers import published as runs
from helpers.hub import WRITER
from helpers.pages import ROOT

SECTION = (ROOT / "docs" / "interop.md").read_text("utf-8").split("\n## The Hugging Face hub\n")[1]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub itself
def test_the_section_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runs.write_run(tmp_path / "runs" / "gpt2-h.6")
    with stand_in.running() as hub:
        stand_in.use(hub, tmp_path / "home", monkeypatch, WRITER)
        commands = re.findall(r"^flashsae (push .*)$", SECTION, re.MULTILINE)
        assert len(commands) == 3
        for command in commands:
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(command))
            assert ended.value.code == 0
        repo = hub.repos["me/gpt2-saes"]
        assert set(repo.branches) == {"main", "second-try"}
        assert {path.name for path in (tmp_path / "look").iterdir()} == {
            name.split("/")[0] for name in hub.files("me/gpt2-saes") if name != ".gitattributes"
        }
        told = set(re.findall(r"^\| (`.*?) \|", SECTION, re.MULTILINE))
        listed = {name.strip("`/") for names in told for name in re.findall(r"`[^`]*`", names)}
        assert {path.name for path in (tmp_path / "look").iterdir()} <= listed
        repo.branches["v1.0"] = repo.branches["second-try"]
        (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
        names = {"flashsae": flashsae}
        exec(code.replace("hf_...", WRITER), names)
        assert names["older"].config == names["sae"].config

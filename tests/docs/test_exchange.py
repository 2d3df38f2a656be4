"""What docs/interop.md loads from folders, and saves, is loaded and saved: tiny files in the same places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae.formats import dictionary_learning, sparsify
from helpers.dense_content import made
from helpers.pages import ROOT

PAGE = (ROOT / "docs" / "interop.md").read_text("utf-8")


def code_of(section: str) -> str:
    """Return the Python of a section of the page."""
    text = re.split(r"^## ", PAGE.split(f"\n## {section}\n", 1)[1], flags=re.MULTILINE)[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def test_dictionary_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "pythia" / "resid_post_layer_3" / "trainer_0"
    (folder / "checkpoints").mkdir(parents=True)
    dictionary_learning.write(folder, made("topk"), False)
    (folder / "checkpoints" / "ae_1000.pt").write_bytes((folder / "ae.pt").read_bytes())
    names = {"flashsae": flashsae}
    exec(code_of("dictionary_learning"), names)
    again = flashsae.load("for_saebench/resid_post_layer_3/trainer_0")
    for name in ("sae", "checkpoint"):
        assert torch.equal(names[name].W_dec, again.W_dec)


def test_sparsify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "my_run" / "layers.10").mkdir(parents=True)
    sparsify.write(tmp_path / "checkpoints" / "my_run" / "layers.10", made("topk"), False)
    names = {"flashsae": flashsae}
    exec(code_of("sparsify"), names)
    assert torch.equal(names["sae"].W_dec, flashsae.load("for_delphi/layers.10").W_dec)
    assert [path.name for path in (tmp_path / "for_delphi").iterdir()] == ["layers.10"]


def test_saebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = {"model": "EleutherAI/pythia-70m-deduped", "hookpoint": "layers.3"}
    flashsae.SAE(flashsae.SAEConfig(8, 32, 4)).save("runs/mine/sae", metadata=metadata)
    names = {"flashsae": flashsae}
    exec(code_of("SAEBench"), names)
    assert names["bench"].cfg.hook_name == "blocks.3.hook_resid_post"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pages import ROOT, code_blocks


def test_what_the_page_writes_for_saelens_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (
        each for each in code_blocks(ROOT / "docs" / "interop.md") if '"for_sae_lens", format' in each and "fit" in each
    )
    names: dict[str, Any] = {}
    exec(block, names)
    assert torch.equal(names["again"].W_enc_T, names["sae"].W_enc_T)
    config = json.loads((tmp_path / "for_sae_lens" / "cfg.json").read_text("utf-8"))
    assert (config["architecture"], config["k"]) == ("topk", 8)
    assert config["metadata"]["hook_name"] == "blocks.6.hook_resid_post"

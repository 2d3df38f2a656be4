"""What is pushed is loaded by each library with the code that the model card shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flashsae
from flashsae.publish.command import Pushing, push_run
from helpers import hub as stand_in
from helpers.hub import WRITER

D, F, K = 7, 37, 5
LIBRARIES = ("saelens", "sparsify", "dictionary_learning")


@pytest.mark.parametrize("revision", [None, "try/2"])
def test_the_code_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    sae = flashsae.SAE(flashsae.SAEConfig(D, F, K), seed=1)
    sae.save(tmp_path / "sae", metadata={"model": "gpt2", "hookpoint": "h.6", "context_length": 8, "dataset": "a/b"})
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    with stand_in.running() as hub, torch.no_grad():
        stand_in.use(hub, tmp_path / "home", monkeypatch, WRITER)
        push_run(tmp_path / "sae", Pushing("me/saes", revision=revision, format=LIBRARIES), Console())
        card = hub.files("me/saes", revision or "main")["README.md"].decode()
        ways = dict(re.findall(r"### ([^\n,]+)[^\n]*\n\n```python\n(.*?)```", card, re.DOTALL))
        assert set(ways) == {"FlashSAE", "SAELens", "sparsify", r"dictionary\_learning"}
        found: dict[str, Any] = {}
        for library, code in ways.items():
            names: dict[str, Any] = {"x": x}
            exec(code, names)
            found[library] = names["sae"]
        expected = sae.eval()(x)
        assert torch.equal(found["FlashSAE"](x), expected)
        for library in ("SAELens", r"dictionary\_learning"):
            torch.testing.assert_close(found[library](x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["sparsify"](x).sae_out, expected, rtol=1e-5, atol=1e-5)

"""The page on SAEs in models that run: its code runs in order, on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from helpers.little_model import HOOKPOINT
from helpers.pages import ROOT, code_blocks

pytestmark = pytest.mark.xdist_group("little model")


def test_the_page_runs(little: tuple[Path, Path]) -> None:
    model, sae = little
    given: dict[str, Any] = {}
    for code in code_blocks(ROOT / "docs" / "interventions.md"):
        code = code.replace('"gpt2"', repr(str(model))).replace('"runs/gpt2-h.6"', repr(str(sae)))
        exec(code.replace('"h.6"', repr(HOOKPOINT)), given)
    with torch.no_grad():
        plain = given["model"](**given["inputs"]).logits
    assert given["ids"].shape[1] == given["inputs"].input_ids.shape[1] + 8
    assert given["spliced"].shape == plain.shape
    assert not torch.equal(given["spliced"], plain)
    assert int((given["values"] != 0).sum()) > 0
    assert isinstance(given["code"], flashsae.SparseCode)
    with flashsae.hook(given["model"], {HOOKPOINT: given["sae"]}, given["edits"]) as codes:
        given["model"].generate(**given["inputs"], max_new_tokens=8, do_sample=False)
    assert not codes.edited[HOOKPOINT].to_dense()[..., [5, 9]].any()

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsae.errors import CheckpointError
from flashsae.report.evaluation_file import RunEvaluation, read_evaluation, write_evaluation

FIGURES: dict[str, Any] = {"fvu": 0.1, "l0": 3.5, "dead_latents": 2, "d_in": 6, "d_sae": 24}
FIGURES |= {"held_out_tokens": 100, "train_tokens": 1000, "steps": 10}


def test_the_file_holds_the_architecture_and_whatever_settings_it_has(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    own = {"threshold": 0.5, "kind": "soft", "is_tied": False}
    write_evaluation(path, RunEvaluation(**FIGURES, architecture="mine", settings=own))
    assert read_evaluation(path) == {**FIGURES, "architecture": "mine", "settings": own}
    assert "k" not in json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(("k", "settings"), [(4, {"k": 4}), (None, {}), ("x", {}), (True, {}), (10**400, {})])
def test_what_version_0_1_wrote_is_read(tmp_path: Path, k: Any, settings: dict[str, Any]) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**FIGURES, "k": k}), "utf-8")
    assert read_evaluation(path) == {**FIGURES, "settings": settings}


@pytest.mark.parametrize(("name", "value"), [("settings", [1]), ("settings", "k"), ("architecture", 3)])
def test_what_is_no_description_of_an_sae_is_one_sentence(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**FIGURES, name: value}), "utf-8")
    with pytest.raises(CheckpointError, match=rf"evaluation\.json is damaged: {name}: expected"):
        read_evaluation(path)

from __future__ import annotations

from pathlib import Path

import pytest

from flashsae.data.existing import held_hookpoints, moved_place
from flashsae.errors import CheckpointError


def test_activations_that_were_moved_together_with_their_run_are_found(copy: Path, tmp_path: Path) -> None:
    there = tmp_path / "new" / "runs" / "activations" / "acts"
    there.parent.mkdir(parents=True)
    copy.rename(there)
    folder = tmp_path / "new" / "runs" / "activations"
    assert moved_place(there, folder) == there
    assert moved_place(Path("/old/project/runs/activations/acts"), folder) == there
    with pytest.raises(CheckpointError, match=r"neither in /old/other nor where a move of both would have put them"):
        moved_place(Path("/old/other"), folder)


@pytest.mark.parametrize("prefix", ["transformer", "model", "bert", "gpt_neox"])
def test_the_name_of_the_base_model_may_stand_before_a_hookpoint(prefix: str) -> None:
    held = ["h.0", "h.1", "h.10"]
    assert held_hookpoints(f"{prefix}.h.1", held) == ["h.1"]
    assert held_hookpoints(f"{prefix}.h.*", held) == held
    assert held_hookpoints(f"{prefix}.h.1", [f"{prefix}.h.1", "h.1"]) == [f"{prefix}.h.1"]


@pytest.mark.parametrize("prefix", ["bogus", "encoder", "decoder", "h", "*", "", "transformer.transformer"])
def test_another_word_before_a_hookpoint_is_not_dropped(prefix: str) -> None:
    assert held_hookpoints(f"{prefix}.h.1", ["h.0", "h.1"]) == [f"{prefix}.h.1"]

from __future__ import annotations

from pathlib import Path

import pytest

from flashsae.data.existing import moved_place
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

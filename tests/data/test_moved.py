from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashsae.data.cache_index import CacheIndex
from flashsae.data.moved import moved_place
from flashsae.errors import CheckpointError
from flashsae.settings.reading import ActivationsConfig

RUN = ActivationsConfig(model="tiny", hookpoint="h.1")


def test_activations_that_were_moved_together_with_their_run_are_found(copy: Path, tmp_path: Path) -> None:
    there = tmp_path / "new" / "runs" / "activations" / "acts"
    there.parent.mkdir(parents=True)
    copy.rename(there)
    folder = tmp_path / "new" / "runs" / "activations"
    assert moved_place(RUN, there, folder) == there
    assert moved_place(RUN, Path("/old/project/runs/activations/acts"), folder) == there
    with pytest.raises(CheckpointError, match=r"neither in /old/other nor where a move of both would have put them"):
        moved_place(RUN, Path("/old/other"), folder)


@pytest.mark.parametrize("other", [{"model": "gpt2"}, {"hookpoint": "h.1, h.70"}, {"hookpoint": "layers.*"}])
def test_a_cache_of_the_same_name_that_holds_something_else_is_not_taken(
    other: dict[str, str], copy: Path, tmp_path: Path
) -> None:
    settings = ActivationsConfig(**{"model": "tiny", "hookpoint": "h.1", **other})
    with pytest.raises(CheckpointError, match="neither in /old/copy nor"):
        moved_place(settings, Path("/old/copy"), tmp_path / "activations")
    assert moved_place(RUN, Path("/old/copy"), tmp_path / "activations") == copy


def test_a_run_that_has_trained_writes_to_no_cache_that_is_not_complete(copy: Path, tmp_path: Path) -> None:
    replace(CacheIndex.read(copy), complete=False).write(copy)
    with pytest.raises(CheckpointError, match=r"copy is not complete \([\d,]+ rows so far\): finish it"):
        moved_place(RUN, copy, tmp_path / "activations")
    with pytest.raises(CheckpointError, match="neither in /old/copy nor"):
        moved_place(RUN, Path("/old/copy"), tmp_path / "activations")
    (copy / "index.json").write_text("{}")
    assert moved_place(RUN, Path("/old/copy"), tmp_path / "activations") == copy  # so that it is told as damaged

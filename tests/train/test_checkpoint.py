from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from flashsae.errors import CheckpointError
from flashsae.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from helpers import kill


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"data": {"epoch": 1}}, {"a": torch.arange(6).view(2, 3), "b": torch.randn(4)})


def test_round_trip_and_only_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20_000_000, 300_000_000):
        saved = _checkpoint(step)
        path = save_checkpoint(tmp_path, saved)
    assert list_checkpoints(tmp_path) == [tmp_path / "step-20000000", path]
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state) == (300_000_000, saved.state)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_leftovers_of_a_kill_are_neither_found_nor_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.x.partial").mkdir()
    save_checkpoint(tmp_path, _checkpoint(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_any_damage_is_found(name: str, damage: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(3)) / name
    content = path.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:-3])
    else:
        path.unlink()
    back = rf".*{re.escape(name)}.* Remove the folder step-00000003 to go on from the start\.$"
    with pytest.raises(CheckpointError, match=back):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format": "x"}, "is something else"), ({"format_version": 9}, "has format version 9, .* reads 5")],
)
def test_foreign_checkpoints_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(3))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_saving_survives_a_kill_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Checkpoint(20, {"a": 1}, {"x": torch.ones(3)}), Checkpoint(40, {"a": 2}, {"x": torch.zeros(3)})

    def prepare(root: Path) -> None:
        save_checkpoint(root, Checkpoint(10, {}, {}))
        save_checkpoint(root, old)

    def work(root: Path) -> None:
        save_checkpoint(root, new)

    def some_checkpoint_is_whole(root: Path) -> None:
        assert load_checkpoint(list_checkpoints(root)[-1]).step in (20, 40)

    kill.survive_every_kill(
        tmp_path,
        monkeypatch,
        prepare=prepare,
        work=work,
        after_kill=some_checkpoint_is_whole,
    )


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(3))
    renamed = path.rename(tmp_path / "step-00000064")
    with pytest.raises(CheckpointError, match=r"holds the checkpoint of step 3: it was renamed\. Give it its name"):
        load_checkpoint(renamed)


def test_the_way_back_from_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    for step, way in ((3, "from the start"), (7, "from step-00000003")):
        path = save_checkpoint(tmp_path, _checkpoint(step))
        (path / "state.json").write_text("{}")
        with pytest.raises(CheckpointError, match=rf"Remove the folder {path.name} to go on {way}\."):
            load_checkpoint(path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(3)) / name
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}: it is a folder"):
        load_checkpoint(path.parent)

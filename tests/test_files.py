from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from flashsae import files
from flashsae.errors import CheckpointError, StorageError


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    files.write_atomic(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"could not write .*a\.json: No space left on device\. Free some space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def killed(aside: Path, target: Path) -> None:
        assert (aside.read_text(), target.read_text()) == ("new", "old")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_really_full_device_is_one_sentence() -> None:
    def fill() -> None:
        with files.storage_errors(Path("/dev/full")):
            Path("/dev/full").write_text("x")

    with pytest.raises(StorageError, match=r"could not write /dev/full: No space left on device"):
        fill()


def test_atomic_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with files.atomic_directory(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError), files.atomic_directory(tmp_path / "other") as folder:
        (folder / "a").write_text(str(1 / 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_atomic_directory_overwrites_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with files.atomic_directory(path) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(StorageError, match="exists already and is not overwritten"), files.atomic_directory(path):
        pass
    with files.atomic_directory(path, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    with files.only_one(tmp_path):
        with pytest.raises(StorageError, match="another process works in"), files.only_one(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    with files.only_one(tmp_path), files.only_one(tmp_path.parent):
        pass


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
    files.save_tensors(tmp_path / "t.safetensors", tensors)
    for name, tensor in files.load_tensors(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors: it is damaged"):
        files.load_tensors(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors: it is damaged"):
        files.load_json(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        files.load_json(tmp_path / "none.json")

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from flashsae.errors import CheckpointError, StorageError
from flashsae.files import atomic, documents
from helpers import kill


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "old")
    atomic.write_atomic(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"could not write .*a\.json: No space left on device\. Free some space"):
        atomic.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "old")

    def killed(aside: Path, target: Path) -> None:
        assert (aside.read_text(), target.read_text()) == ("new", "old")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_really_full_device_is_one_sentence() -> None:
    def fill() -> None:
        with atomic.storage_errors(Path("/dev/full")):
            Path("/dev/full").write_text("x")

    with pytest.raises(StorageError, match=r"could not write /dev/full: No space left on device"):
        fill()


def test_atomic_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with atomic.atomic_directory(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError), atomic.atomic_directory(tmp_path / "other") as folder:
        (folder / "a").write_text(str(1 / 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_atomic_directory_overwrites_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with atomic.atomic_directory(path) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(StorageError, match="exists already and is not overwritten"), atomic.atomic_directory(path):
        pass
    with atomic.atomic_directory(path, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_another_process_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def save() -> None:
        with atomic.atomic_directory(tmp_path / "saved") as ours:
            (ours / "ours").touch()
            (tmp_path / "saved").mkdir()
            (tmp_path / "saved" / "theirs").touch()

    with pytest.raises(StorageError, match="exists already and is not overwritten"):
        save()
    assert kill.contents(tmp_path) == {"saved": None, "saved/theirs": b""}


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    with atomic.only_one(tmp_path):
        with pytest.raises(StorageError, match="another process works in"), atomic.only_one(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    with atomic.only_one(tmp_path), atomic.only_one(tmp_path.parent):
        pass


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
    atomic.save_tensors(tmp_path / "t.safetensors", tensors)
    for name, tensor in documents.load_tensors(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors: it is damaged"):
        documents.load_tensors(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors: it is damaged"):
        documents.load_json(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        documents.load_json(tmp_path / "none.json")


def _write(root: Path) -> None:
    atomic.clear_leftovers(root)
    atomic.write_atomic(root / "a.json", "new" * 100)


def test_write_atomic_survives_a_kill_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def old_or_new(root: Path) -> None:
        assert (root / "a.json").read_text() in ("old", "new" * 100)

    moments = kill.survive_every_kill(
        tmp_path,
        monkeypatch,
        prepare=lambda root: atomic.write_atomic(root / "a.json", "old"),
        work=_write,
        after_kill=old_or_new,
    )
    assert moments >= 4  # made, flushed, renamed, the folder flushed


def _fill(root: Path) -> None:
    with atomic.atomic_directory(root / "run", overwrite=True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new" * 100)


@pytest.mark.parametrize("is_there", [False, True])
def test_atomic_directory_survives_a_kill_at_every_moment(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(root: Path) -> None:
        if is_there:
            with atomic.atomic_directory(root / "run") as folder:
                (folder / "a").write_text("old")

    def old_or_new(root: Path) -> None:
        atomic.settle(root / "run")
        if is_there:
            assert (root / "run" / "a").read_text() in ("old", "new" * 100)
        assert {path.name for path in root.iterdir()} <= {"run"}

    kill.survive_every_kill(tmp_path, monkeypatch, prepare=prepare, work=_fill, after_kill=old_or_new)


def test_what_somebody_is_writing_is_no_leftover(tmp_path: Path) -> None:
    with atomic.atomic_directory(tmp_path / "run") as folder:
        atomic.settle(tmp_path / "run")
        (folder / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_leftovers_of_any_version_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    for name in (".step-00000016.7.partial", ".sae.0123456789abcdef.partial", ".sae.7.old"):
        (tmp_path / "deep" / name).mkdir(parents=True)
    (tmp_path / "deep" / "sae").mkdir()
    for name in (".index.json.7.partial", "mine.partial", ".mine.partial"):
        (tmp_path / name).write_text("x")
    atomic.clear_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        ".mine.partial",
        "deep",
        "deep/sae",
        "mine.partial",
    ]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127 + "y"])
def test_a_name_as_long_as_the_file_system_allows_is_written(name: str, tmp_path: Path) -> None:
    atomic.write_atomic(tmp_path / name, "x")
    with atomic.atomic_directory(tmp_path / "deep" / name, overwrite=True):
        pass
    with pytest.raises(StorageError, match=r"File name too long\. Choose a shorter name"):
        atomic.write_atomic(tmp_path / f"{name}x", "x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "no"), "Permission denied. Choose a folder that you may write to"),
        (OSError(errno.EROFS, "no"), "Read-only file system. Choose a folder that you may write to"),
        (Exception("IO error (os error 28)"), "No space left on device. Free some space"),  # as Rust tells it
        (IsADirectoryError(errno.EISDIR, "no"), "Is a directory. Choose another folder"),
    ],
)
def test_each_refusal_of_the_system_comes_with_its_own_advice(error: Exception, message: str) -> None:
    with pytest.raises(StorageError, match=f"could not write a: {message}"), atomic.storage_errors(Path("a")):
        raise error


def test_what_is_no_refusal_of_the_system_passes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.storage_errors(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_obey_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        atomic.save_tensors(tmp_path / "a", {"a": torch.zeros(2)})
        atomic.write_atomic(tmp_path / "b", "x")
        with atomic.atomic_directory(tmp_path / "c"):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in "abc"]
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o777 & ~umask]


def test_where_folders_cannot_be_locked_a_file_stands_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)  # as on Windows
    monkeypatch.setattr(atomic.tempfile, "gettempdir", lambda: str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    (tmp_path / "run").mkdir()
    with atomic.only_one(tmp_path / "run"):
        with pytest.raises(StorageError, match="another process works in"), atomic.only_one(tmp_path / "run"):
            pass
        assert list((tmp_path / "run").iterdir()) == []
    with atomic.only_one(tmp_path / "run", wait=True), atomic.only_one(tmp_path / "locks"):
        pass

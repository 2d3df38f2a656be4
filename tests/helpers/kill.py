"""Kills at every write, flush and rename, in this process: from the moment of the kill on, nothing reaches the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """A kill cannot be caught; what a `finally` would still do to the disk is refused as well."""


class _Death:
    def __init__(self, root: Path, moment: int) -> None:
        self.root, self.left = str(root), moment

    def touch(self, path: object) -> bool:
        """Count an operation below root; return whether the process is dead by now."""
        if str(path).startswith(self.root):
            self.left -= 1
        return self.left < 0 and str(path).startswith(self.root)


_death: _Death | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    is_change = event in _CHANGES or (event == "open" and int(str(arguments[2] or 0)) & _WRITING)
    if _death is not None and is_change and _death.touch(os.fspath(str(arguments[0]))):
        raise Killed


sys.addaudithook(_hear)  # for ever, and without effect but in `killed`


@contextmanager
def killed(root: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `moment` changes below `root` happen and none after them; the file that was being flushed is cut in half."""
    global _death  # noqa: PLW0603 - an audit hook has no other way to know
    fsync = os.fsync

    def dying_fsync(descriptor: int) -> None:
        if _death is not None and _death.touch(root):
            if _death.left == -1 and os.path.isfile(f"/proc/self/fd/{descriptor}"):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise Killed
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying_fsync)
        patch.setattr(os, "getpid", lambda: 7)  # as in a container
        _death = _Death(root, moment)
        try:
            yield
        finally:
            _death = None


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what lies in a folder and below: files with their bytes, folders with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def survive_every_kill(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prepare: Callable[[Path], object] = lambda root: None,
    work: Callable[[Path], None],
    after_kill: Callable[[Path], None] = lambda root: None,
    moments: range = range(1000),
) -> int:
    """Kill `work` at every moment, do it again, and expect what it leaves when it is never killed.

    Args:
        tmp_path, monkeypatch: fixtures.
        prepare: makes what is there before, in a folder of its own.
        work: what is killed; called with that folder.
        after_kill: looks at what a kill left.
        moments: at which it is killed, up to its end.
    Returns:
        the number of moments that there are, up to the step of `moments`.
    """
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare(whole)
    work(whole)
    expected = contents(whole)
    for moment in moments:
        root = tmp_path / f"killed-{moment}"
        root.mkdir()
        prepare(root)
        try:
            with killed(root, moment, monkeypatch):
                work(root)
        except Killed:
            after_kill(root)
            work(root)
            assert contents(root) == expected, f"killed at change {moment}"
        else:
            assert contents(root) == expected
            return moment
    raise AssertionError("there is no end to it")

"""Files that are either whole or not there: written aside, flushed to disk, renamed into place.

What is being written lies beside its place as `.NAME.<random>.partial`, a folder that is being replaced as
`.NAME.<random>.old`. What a kill leaves of them is put back or removed by whoever holds the lock of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from flashsae.errors import FlashSAEError, StorageError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_LEFTOVER = re.compile(r"\.(.+)\.[^.]+\.(partial|old)", re.DOTALL)
_FULL, _FORBIDDEN = "Free some space or choose another folder", "Choose a folder that you may write to"
_ADVICE = {
    errno.ENOSPC: _FULL,
    getattr(errno, "EDQUOT", 0): _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENAMETOOLONG: "Choose a shorter name",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except FlashSAEError:
        raise
    except Exception as error:
        # libraries written in Rust raise plain exceptions that end in "(os error 28)"
        told = re.search(r"\(os error (\d+)\)", str(error))
        if not told and not isinstance(error, OSError | SafetensorError):
            raise
        number = int(told[1]) if told else getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error)
        advice = _ADVICE.get(number or -1, "Choose another folder")
        raise StorageError(f"could not write {path}: {reason}. {advice}; what was written before is intact.") from error


def _fsync(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows opens no folders, and writes their entries through
    # a copy of a file that may not be written to is none that may be; Windows flushes what is open for writing alone
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path, kind: str) -> Path:
    """Return a name beside `path` that nobody has; a process id would not do, since containers repeat it."""
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.{kind}")


def _short(name: str) -> str:
    """Return what of a name leaves room for ours in the 255 bytes that file systems allow."""
    return os.fsdecode(os.fsencode(name)[:220])


def write_atomic(path: Path, content: str | bytes | Sequence[bytes | memoryview]) -> None:
    """Replace `path` by `content`; a kill at any moment leaves the old content or the new one, never a part.

    Args:
        path: of the file.
        content: all of it, or its parts in order.
    Raises:
        StorageError: the file system refused; `path` is as it was.
    """
    aside = _aside(path, "partial")
    data = content.encode() if isinstance(content, str) else content
    parts = [data] if isinstance(data, bytes) else data
    with storage_errors(path):
        try:
            with open(aside, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def atomic_directory(
    path: Path, *, overwrite: bool = False, advice: str = "choose another folder or remove it."
) -> Iterator[Path]:
    """Fill a folder aside and rename it to `path` when the block ends without an error.

    Args:
        path: must not exist, unless `overwrite`. Its parents are made. A link stays one: what it leads to is written.
        overwrite: replace a folder that is there already.
        advice: what to do where `path` exists.
    Yields:
        the folder to write into.
    Raises:
        StorageError: the file system refused, or `path` exists; nothing is left behind.
    """
    with storage_errors(path):
        path = _behind_link(path)
        settle(path)
        exists = StorageError(f"{path} exists already and is not overwritten; {advice}")
        if path.exists() and not (overwrite and path.is_dir()):
            raise exists
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path, "partial")
        aside.mkdir()
        with only_one(aside):  # so that nobody takes it for a leftover
            try:
                yield aside
                for file in sorted(aside.rglob("*")):
                    if file.is_dir() or file.stat().st_nlink == 1:  # a link is to what was flushed where it was written
                        _fsync(file)
                _fsync(aside)
                if path.exists() and not overwrite:  # another process was faster
                    raise exists
                _swap(aside, path)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        _fsync(path.parent)


def _behind_link(path: Path) -> Path:
    """Return where a link leads; any other path as it is, which messages then name as it was given."""
    return path.resolve() if path.is_symlink() else path


def _swap(aside: Path, path: Path) -> None:
    if not path.exists():
        os.replace(aside, path)
        return
    old = _aside(path, "old")
    with only_one(path):  # also under its other name
        os.replace(path, old)
        try:
            os.replace(aside, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old)


def settle(path: Path) -> None:
    """Put back a folder that a kill caught while it was replaced, and remove what else was left of writing it.

    What another process is writing at this moment is left alone.
    """
    with storage_errors(path):
        path = _behind_link(path)
        beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for leftover in beside:
        match = _LEFTOVER.fullmatch(leftover.name)
        if match and match[1] == _short(path.name) and leftover.is_dir():
            try:
                with only_one(leftover):
                    _clear(leftover, path if match[2] == "old" else None)
            except StorageError:
                continue


def clear_leftovers(folder: Path) -> None:
    """Settle everything in a folder and below; for the one who holds its lock."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            match = _LEFTOVER.fullmatch(name)
            if match:
                _clear(Path(parent, name), Path(parent, match[1]) if match[2] == "old" else None)
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]


def discard(folder: Path, made: Collection[str]) -> bool:
    """Remove the folder of work that failed if it holds no files but those of these names; return whether it was so.

    Leftovers of writing and empty folders do not count.
    """
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]
        if any(name not in made and not _LEFTOVER.fullmatch(name) for name in names):
            return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _clear(leftover: Path, origin: Path | None) -> None:
    with storage_errors(leftover):
        if origin is not None and not origin.exists():
            os.replace(leftover, origin)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, readable for whom the umask allows it.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(path):
        path.touch()
        mode = path.stat().st_mode  # the library makes a file of its own that is private
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, path)
        path.chmod(mode)


@contextmanager
def only_one(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Let one process at a time work in a folder; the system forgets it when the process ends, however it does.

    Args:
        folder: exists.
        wait: until the other process has ended, instead of refusing.
    Raises:
        StorageError: another process works in the folder.
    """
    with storage_errors(folder):
        release = _locked_file(folder, wait) if fcntl is None else _locked_folder(folder, wait)
    if release is None:
        raise StorageError(f"another process works in {folder}; wait for it, or choose another folder.")
    try:
        yield
    finally:
        release()


def _locked_folder(folder: Path, wait: bool) -> Callable[[], None] | None:
    """Lock the folder itself, which leaves nothing in it; return what unlocks it, or None if another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return partial(os.close, descriptor)


def _locked_file(folder: Path, wait: bool) -> Callable[[], None] | None:
    """Lock a file that stands for the folder, where folders cannot be locked: as `_locked_folder`, on this machine."""
    import filelock

    stands_for = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    lock = filelock.FileLock(Path(tempfile.gettempdir(), f"flashsae-{stands_for}.lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        return None
    return lock.release

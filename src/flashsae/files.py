"""Files that are either whole or not there: written aside, flushed to disk, renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from flashsae.errors import CheckpointError, StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"could not write {path}: {reason}. Free some space or choose another folder; "
            "what was written before is intact."
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a kill at any moment leaves the old content or the new one, never a part.

    Raises:
        StorageError: the file system refused; `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path):
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder aside and rename it to `path` when the block ends without an error.

    Args:
        path: must not exist, unless `overwrite`. Its parents are made.
        overwrite: replace a folder that is there already.
    Yields:
        the folder to write into.
    Raises:
        StorageError: the file system refused, or `path` exists; nothing is left behind.
    """
    with storage_errors(path):
        if path.exists() and not (overwrite and path.is_dir()):
            raise StorageError(f"{path} exists already and is not overwritten; choose another folder or remove it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            aside.mkdir()
            yield aside
            for file in sorted(aside.rglob("*")):
                _fsync(file)
            _fsync(aside)
            if path.exists():
                old = aside.with_suffix(".old")
                os.replace(path, old)
                os.replace(aside, path)
                shutil.rmtree(old)
            else:
                os.replace(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _fsync(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(path):
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, path)


def save_tensors_atomic(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file; for small ones, since it is put together in memory.

    Raises:
        StorageError: the file system refused; `path` is as it was.
    """
    write_atomic(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {_reason(path, error)}") from error


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_reason(path, error)}") from error


def load_manifest(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read a JSON file that says what it is: {"format": kind, "format_version": version, ...}.

    Raises:
        CheckpointError: the file is missing, damaged, of something else, or of another version.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CheckpointError(f"{path} is something else: expected the format {kind!r} of FlashSAE in it.")
    if content.get("format_version") != version:
        raise CheckpointError(
            f"{path} has format version {content.get('format_version')}, this FlashSAE reads {version}. Use the "
            f"FlashSAE that wrote it ({content.get('flashsae_version', 'unknown')}), or write it again."
        )
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def only_one(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Let one process at a time work in a folder; the system forgets it when the process ends, however it does.

    Args:
        folder: exists.
        wait: until the other process has ended, instead of refusing.
    Raises:
        StorageError: another process works in the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # the lock is on the folder itself and leaves nothing in it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise StorageError(f"another process works in {folder}; wait for it, or choose another folder.") from error
        yield
    finally:
        os.close(descriptor)


def _reason(path: Path, error: Exception) -> str:
    if not path.exists():
        return "there is no such file."
    return f"it is damaged or not of this format ({error})."

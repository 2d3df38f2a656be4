"""The file that says why one of several SAEs of a run does not go on: failed.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from flashsae.files.documents import load_document, write_document

FAILED_FILE = "failed.json"


@dataclass(frozen=True)
class _Failure:
    error: str


def write_failure(folder: Path, error: str) -> None:
    """Write down why the SAE in a folder does not go on.

    Raises:
        StorageError: the file system refused.
    """
    write_document(folder / FAILED_FILE, asdict(_Failure(error)))


def failure_in(folder: Path) -> str | None:
    """Return why the SAE in a folder does not go on; None if nothing is known against it.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = folder / FAILED_FILE
    if not path.exists():
        return None
    advice = "Put a copy of it back."
    return load_document(path, _Failure, must_be_sealed=True, advice=advice).error

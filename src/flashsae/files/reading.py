"""What is asked of a file that is read: whether it is what was written, and if it cannot be read, why not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from flashsae.errors import CheckpointError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str | None, where: str, advice: str) -> None:
    """Raise CheckpointError unless a file has the SHA-256 that is told of it in the file `where`."""
    try:
        found = sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {refusal(path, error)} {advice}") from error
    if found != expected:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one in {where}. {advice}")


def refusal(path: Path, error: Exception) -> str:
    """Say in words why a file cannot be read."""
    if not os.path.lexists(path):
        return "there is no such file."
    if path.is_dir():
        return "it is a folder, where a file is expected."
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)}."
    return f"it is damaged or not of this format ({str(error).rstrip('.') or type(error).__name__})."

"""Short names for contents: what tells a text, a model or activations from others, wherever they lie."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import DataError
from flashsae.files.reading import sha256

_REMEMBERED_BYTES = 1 << 24
"""A file of this size takes longer to hash than the clock of a file system takes to tick, so its time of change can be
trusted; smaller ones are hashed again."""
_THREADS = 4
_SAMPLE_ROWS = 4096


def digest(parts: Iterable[bytes]) -> str:
    """Return 12 hexadecimal digits that stand for `parts`, boundaries included."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:12]


def text_digest(texts: Iterable[str]) -> str:
    """Return 12 hexadecimal digits that stand for strings, of any characters."""
    return digest(text.encode("utf-8", "surrogatepass") for text in texts)


def files_digest(files: Sequence[Path], *, names: bool) -> str:
    """Return 12 hexadecimal digits that stand for the whole content of files in their order.

    Args:
        files: of any size.
        names: whether their names count. Folders never do, so that what was moved is still the same.
    Raises:
        DataError: a file cannot be read.
    Cost: reads every byte: about a second a GB, four files at a time; large files once a process.
    """
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            contents = list(pool.map(_file_digest, files))
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}. Check the file and its permissions."
        ) from error
    labels = (file.name if names else file.suffix.lower() for file in files)
    return digest(part.encode() for pair in zip(labels, contents) for part in pair)


def _file_digest(file: Path) -> str:
    status = file.stat()
    if status.st_size < _REMEMBERED_BYTES:
        return sha256(file)
    return _remembered(file.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered(file: Path, *status: int) -> str:
    return sha256(file)


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 12 hexadecimal digits that stand for named tensors: names, dtypes, shapes and values."""
    return digest(part for name, tensor in tensors for part in (name.encode(), *_tensor_parts(tensor)))


def _tensor_parts(tensor: Tensor) -> tuple[bytes, bytes]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return f"{tensor.dtype} {list(tensor.shape)}".encode(), bytes(memoryview(data))


def rows_digest(rows: Tensor) -> str:
    """Return 12 hexadecimal digits that stand for a matrix: its size and up to 4096 rows at equal distances."""
    sample = rows[:: max(1, len(rows) // _SAMPLE_ROWS)]
    return tensors_digest([(str(list(rows.shape)), sample)])

"""A safetensors file that is mapped into memory, not loaded: it stays as it is however its path changes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashsae.errors import CheckpointError

_ADVICE = "Write the cache again into another folder."
_NAMES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class MappedTensors:
    """The tensors of a file, which may be replaced or removed while they are read.

    Copy on write: torch wants memory that may be written, and nothing here writes.

    Args:
        path: the file.
        expected: dtype and shape by name; a shape of None is one dimension of any length.
    Raises:
        CheckpointError: the file is missing, is truncated, or holds something else.
    """

    def __init__(self, path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:  # checks its header, and that its length fits
                file.keys()
            self._whole = np.memmap(path, np.uint8, "c")
            start = 8 + int.from_bytes(self._whole[:8].tobytes(), "little")
            places = json.loads(self._whole[8:start].tobytes())
            places.pop("__metadata__", None)
            if places.keys() != expected.keys():
                raise ValueError(f"it holds {', '.join(places) or 'nothing'}, expected {', '.join(expected)}")
            self.tensors = {name: self._tensor(start, places[name], *expected[name]) for name in expected}
        except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the shard {path}: {error}. {_ADVICE}") from error

    def _tensor(
        self, start: int, place: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...] | None
    ) -> Tensor:
        told, (low, high) = tuple(place["shape"]), place["data_offsets"]
        expected = told[:1] if shape is None else shape
        fits = low >= 0 and start + high <= len(self._whole) and high - low == prod(told) * dtype.itemsize
        if (_NAMES.get(place["dtype"]), told) != (dtype, expected) or not fits or (start + low) % dtype.itemsize:
            raise ValueError(f"expected {dtype} of shape {'[any]' if shape is None else list(shape)}")
        return torch.from_numpy(self._whole[start + low : start + high]).view(dtype).view(told)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._whole)

    def check(self, crc32: int, where: str) -> None:
        """Raise CheckpointError unless the file, which is read for it, has the CRC-32 that is told in `where`."""
        if zlib.crc32(self._whole.data) != crc32:
            raise self.damaged(f"its checksum is not the one in {where}")

    def damaged(self, why: str) -> CheckpointError:
        """Return the error for a file that holds what cannot be."""
        return CheckpointError(f"{self.path} is damaged: {why}. {_ADVICE}")

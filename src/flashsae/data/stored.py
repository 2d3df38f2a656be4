"""How activations lie on disk: as floats, in eight bits, or compressed; and how any rows of them are read again.

int8: a shard holds the mean and the spread (root mean square about the mean) of each of its dimensions, and each token
a scale for every 64 of them, so that one large dimension or one large token takes nothing from the others:
x ≈ mean + spread · scale · q, with q from -127 to 127.

zstd: blocks of 64 rows are compressed by themselves, each in planes (the first byte of every number, then the second),
since signs and exponents repeat and mantissas do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashsae.data.mapped import MappedTensors
from flashsae.errors import require

StoredDtype = Literal["bfloat16", "float32", "int8"]
Compression = Literal["none", "zstd"]
ACTIVATIONS = "activations"
_STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_GROUP = 64
"""Dimensions of a token that share a scale."""
_LEVELS = 127
BLOCK_ROWS = 64
_LEVEL = 1
"""Of zstd; higher ones are slower and save nothing more of activations (docs/data.md)."""


@dataclass(frozen=True)
class Layout:
    """How the activations of a hookpoint are stored.

    Args:
        width: d, their number for a token.
        dtype: of what lies on disk.
        compression: of it.
    """

    width: int
    dtype: StoredDtype
    compression: Compression = "none"

    @property
    def read_dtype(self) -> torch.dtype:
        """Of the rows that are read: that of the disk, or float32 for int8."""
        return torch.float32 if self.dtype == "int8" else _STORED[self.dtype]

    @property
    def is_plain(self) -> bool:
        """Whether a shard is its rows one behind another, and nothing else."""
        return self.dtype != "int8" and self.compression == "none"

    @property
    def row_bytes(self) -> int:
        """Bytes of a token on disk, before compression."""
        return self.width * _STORED[self.dtype].itemsize + (2 * self._groups if self.dtype == "int8" else 0)

    @property
    def shard_bytes(self) -> int:
        """Bytes that a shard has beside its rows, without names and shapes."""
        return 8 * self.width if self.dtype == "int8" else 0

    @property
    def _groups(self) -> int:
        return -(-self.width // _GROUP)

    def store(self, x: Tensor) -> dict[str, Tensor]:
        """Return a shard: x [n, d] on the CPU, any float dtype, finite -> its tensors, not compressed yet."""
        return _quantise(x) if self.dtype == "int8" else {ACTIVATIONS: x.to(_STORED[self.dtype])}

    def restore(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return what will be read again of a shard that `store` made: [n, d], of `read_dtype`."""
        x = stored[ACTIVATIONS]
        return x if self.dtype != "int8" else _dequantise(x, stored["scale"], stored["spread"], stored["mean"])

    def compress(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a shard that `store` made as its file holds it.

        Raises:
            MissingExtraError: it is to be compressed and zstandard is not installed.
        """
        return stored if self.compression == "none" else _compress(stored)

    def expected(self, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
        """Return the dtypes and shapes of the tensors of a shard; None for bytes that may be any number."""
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
            ACTIVATIONS: (_STORED[self.dtype], (rows, self.width))
        }
        if self.compression == "zstd":
            frames = -(-rows // BLOCK_ROWS) * _STORED[self.dtype].itemsize
            tensors = {ACTIVATIONS: (torch.uint8, None), "ends": (torch.int64, (frames,))}
        if self.dtype == "int8":
            tensors["scale"] = torch.float16, (rows, self._groups)
            tensors |= dict.fromkeys(("mean", "spread"), (torch.float32, (self.width,)))
        return tensors


class StoredRows:
    """The activations of a shard.

    Args:
        path: its file, which is mapped.
        layout: how they are stored.
        rows: how many there are.
    Raises:
        CheckpointError: the file is missing, is truncated, or holds what cannot be a shard.
        MissingExtraError: it is compressed and zstandard is not installed.
    """

    def __init__(self, path: Path, layout: Layout, rows: int) -> None:
        if layout.compression == "zstd":
            require("zstandard", "hf")  # now, not at the first batch
        self.file = file = MappedTensors(path, layout.expected(rows))
        self._layout, self._rows = layout, rows
        tensors = file.tensors
        if layout.compression == "zstd":
            ends = tensors["ends"].tolist()
            self._bounds = [0, *ends]
            if ends[-1] != len(tensors[ACTIVATIONS]) or any(a >= b for a, b in zip(self._bounds, ends)):
                raise file.damaged("its compressed blocks do not fill it")
        if layout.dtype == "int8":
            self._scaling = tensors["spread"].clone(), tensors["mean"].clone()
            if not all(bool(each.isfinite().all()) for each in self._scaling):
                raise file.damaged("the means and spreads of its dimensions are not finite")

    def read(self, index: Tensor) -> Tensor:
        """Return rows: index [n], int64, ascending, in range -> [n, d], copies.

        Raises:
            CheckpointError: a block is not what was compressed.
        """
        tensors = self.file.tensors
        if self._layout.compression == "zstd":
            stored = self._decompressed(index)
        else:
            stored = tensors[ACTIVATIONS].index_select(0, index)
        if self._layout.dtype != "int8":
            return stored
        return _dequantise(stored, tensors["scale"].index_select(0, index), *self._scaling)

    def _decompressed(self, index: Tensor) -> Tensor:
        zstandard = require("zstandard", "hf")
        read = partial(self._block, zstandard, zstandard.ZstdDecompressor())
        blocks, counts = np.unique(index.numpy() // BLOCK_ROWS, return_counts=True)
        rows = torch.empty(len(index), self._layout.width, dtype=_STORED[self._layout.dtype], device="cpu")
        low = 0
        for block, count in zip(blocks.tolist(), counts.tolist()):
            torch.index_select(read(block), 0, index[low : low + count] % BLOCK_ROWS, out=rows[low : low + count])
            low += count
        return rows

    def _block(self, zstandard: Any, decompressor: Any, number: int) -> Tensor:
        """Return all rows of a block: [up to 64, d], of the stored dtype."""
        dtype = _STORED[self._layout.dtype]
        rows = min(BLOCK_ROWS, self._rows - number * BLOCK_ROWS)
        size, data = rows * self._layout.width, self.file.tensors[ACTIVATIONS].numpy()
        planes = np.empty((size, dtype.itemsize), np.uint8)
        for plane in range(dtype.itemsize):
            at = number * dtype.itemsize + plane
            frame = data[self._bounds[at] : self._bounds[at + 1]]
            planes[:, plane] = self._frame(zstandard, decompressor, frame, size)
        return torch.from_numpy(planes.reshape(-1)).view(dtype).view(rows, self._layout.width)

    def _frame(self, zstandard: Any, decompressor: Any, frame: np.ndarray, size: int) -> np.ndarray:
        """Return what was compressed, of which the size is known; more is never made room for."""
        try:
            if zstandard.frame_content_size(frame) == size:
                return np.frombuffer(decompressor.decompress(frame), np.uint8, size)
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise self.file.damaged(f"a block cannot be decompressed ({error})") from error
        raise self.file.damaged("a block is of another size than its rows")


def _groups(x: Tensor) -> tuple[tuple[Tensor, slice], ...]:
    """Return views of x [n, d] as [n, groups, dimensions], each with which groups they are: the last may be short."""
    full = x.shape[1] // _GROUP
    parts = list[tuple[Tensor, slice]]()
    if full:
        parts.append((x[:, : full * _GROUP].view(len(x), full, _GROUP), slice(0, full)))
    if x.shape[1] % _GROUP:
        parts.append((x[:, full * _GROUP :].unsqueeze(1), slice(full, full + 1)))
    return tuple(parts)


def _quantise(x: Tensor) -> dict[str, Tensor]:
    """Return a shard in eight bits; sums in float64, so that no dimension can be too large for its own square."""
    mean = x.mean(0, dtype=torch.float64).float()
    z = x.float() - mean
    spread = (torch.linalg.vector_norm(z, dim=0, dtype=torch.float64) / len(x) ** 0.5).float()
    z /= spread.where(spread >= torch.finfo(torch.float32).tiny, 1.0)
    q = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(len(x), -(-x.shape[1] // _GROUP), dtype=torch.float16, device="cpu")
    for (part, groups), (out, _) in zip(_groups(z), _groups(q)):
        scale[:, groups] = torch.linalg.vector_norm(part, torch.inf, dim=2) / _LEVELS
        used = scale[:, groups].float().unsqueeze(2)
        part /= used.where(used > 0, torch.inf)
        out.copy_(part.round_().clamp_(-_LEVELS, _LEVELS))
    return {ACTIVATIONS: q, "scale": scale, "spread": spread, "mean": mean}


def _dequantise(q: Tensor, scale: Tensor, spread: Tensor, mean: Tensor) -> Tensor:
    """Return the rows that were quantised: q [n, d] int8, scale [n, groups] float16 -> [n, d] float32."""
    x = torch.empty(q.shape, dtype=torch.float32, device="cpu")
    for (part, groups), (out, _) in zip(_groups(q), _groups(x)):
        torch.mul(part, scale[:, groups].float().unsqueeze(2), out=out)
    return torch.addcmul(mean, x, spread, out=x)


def _compress(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a shard with the activations in compressed blocks."""
    compressor = require("zstandard", "hf").ZstdCompressor(level=_LEVEL)
    x = tensors[ACTIVATIONS].contiguous()
    frames = [
        compressor.compress(np.ascontiguousarray(plane).data)
        for block in (x[row : row + BLOCK_ROWS] for row in range(0, len(x), BLOCK_ROWS))
        for plane in block.view(torch.uint8).numpy().reshape(-1, x.dtype.itemsize).T
    ]
    data = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8)
    ends = torch.tensor(list(map(len, frames)), dtype=torch.int64, device="cpu").cumsum(0)
    return {**tensors, ACTIVATIONS: data, "ends": ends}

"""Shards of a cache, gathered from the chunks of a source and written one after another."""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import cast

import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.cache_index import TOKENS_FOLDER, CacheIndex, Mark, Rounding, Shard, shard_path
from flashsae.data.sources import Chunk, Cursor
from flashsae.data.stored import ACTIVATIONS
from flashsae.errors import DataError
from flashsae.files.atomic import write_atomic

_ROWS_AT_ONCE = 4096
_THREADS = 6
_SHARDS_BEHIND = 3, 8  # at least, at most
_BYTES_BEHIND = 1 << 30
_INDEX_SECONDS = 1.0
_KINDS = {torch.bfloat16: "BF16", torch.float32: "F32"}


class _Spread:
    """What is rounded away of activations, and their variance, summed in float64 chunk by chunk.

    Source: Chan, Golub and LeVeque 1979, for variances of parts.
    """

    def __init__(self) -> None:
        self.lost = self.variance = 0.0
        self._rows = 0
        self._mean = torch.zeros(0, dtype=torch.float32, device="cpu")

    def update(self, x: Tensor, rounded: Tensor | None = None) -> None:
        """Add a chunk: [n, d], and as it is stored, if that is known."""
        if len(x) == 0:
            return
        x64 = x.double()
        mean = x64.mean(0)
        if rounded is not None:
            self.lost += (x64 - rounded.double()).square().sum().item()
        self.variance += (x64 - mean).square().sum().item()
        if self._rows:
            share = len(x) / (self._rows + len(x))
            self.variance += (mean - self._mean).square().sum().item() * self._rows * share
            mean = self._mean + (mean - self._mean) * share
        self._rows, self._mean = self._rows + len(x), mean

    def lose(self, x: Tensor, rounded: Tensor) -> None:
        """Add what is rounded away of rows whose variance was added: both [n, d]."""
        for row in range(0, len(x), _ROWS_AT_ONCE):
            part = slice(row, row + _ROWS_AT_ONCE)
            self.lost += (x[part].double() - rounded[part].double()).square().sum().item()


_OnTheWay = tuple[Tensor, torch.cuda.Event | None]
"""Memory of the CPU, page-locked behind a GPU, and what has happened once the GPU has filled it."""


@dataclass
class _Gathering:
    """A shard that is being gathered.

    Args:
        rounding: by hookpoint.
        chunks: of each forward, by hookpoint, on their way to the CPU; and what is known of their tokens.
        rows: tokens.
    """

    rounding: dict[str, _Spread]
    chunks: list[tuple[dict[str, _OnTheWay], Chunk]] = field(default_factory=list)
    rows: int = 0


@dataclass(frozen=True)
class _Writing:
    """A shard that is being written.

    Args:
        shard: what the index will say of it.
        cursor: of the source, behind it.
        block_begin: rows before the block of documents that its last chunk is of, or before the first that may be cut.
        is_full: it is not the rest at the end.
    """

    shard: Future[Shard]
    cursor: Cursor
    block_begin: int
    is_full: bool


class ShardWriter:
    """Gathers chunks and writes a shard when it has enough: in threads, while a GPU computes the next ones.

    The index is written here, and names a shard once all of its files are on disk, in order. Behind a GPU it may lag by
    a second, so a kill costs that much more. Use it as a context, which waits for the threads.

    Args:
        directory: of the cache.
        index: of it; grows by each shard, and is written with it.
        shard_rows: least rows of a shard. Memory: twice that many rows of every hookpoint; behind a GPU four times, or
            up to nine times while that is about a gigabyte, page-locked.
    """

    def __init__(self, directory: Path, index: CacheIndex, shard_rows: int) -> None:
        self._directory = directory
        self._index = index
        self._shard_rows = shard_rows
        self._layouts = {name: index.layout(name) for name in index.settings["hookpoints"]}
        self._cursor: Cursor = index.cursor or {}
        self._is_cut = may_be_cut(index)
        self._block_begin = index.marks[0].rows if index.marks and self._is_cut else 0
        self._pool = ThreadPoolExecutor(_THREADS, "flashsae-shards")
        row_bytes = sum(layout.row_bytes for layout in self._layouts.values())
        least, most = _SHARDS_BEHIND
        self._behind_a_gpu = min(max(least, _BYTES_BEHIND // max(1, shard_rows * row_bytes)), most)
        self._most_behind = 0
        self._writing: deque[_Writing] = deque()
        self._written = time.monotonic()
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._gathering = _Gathering({name: _Spread() for name in self._layouts})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, chunk: Chunk, cursor: Cursor) -> int:
        """Take the tokens of one forward and the cursor behind them; return how many they are.

        Raises:
            StorageError: the file system refused, now or for a shard before.
        """
        stored = {}
        for name, acts in chunk.acts.items():
            layout, spread = self._layouts[name], self._gathering.rounding[name]
            if layout.dtype == "int8":
                spread.update(acts)  # what is rounded away is known with the whole shard
            elif acts.dtype != torch.bfloat16:
                spread.update(acts, acts.bfloat16())
            stored[name] = self._on_the_way(acts if layout.dtype == "int8" else acts.to(layout.read_dtype))
            self._most_behind = self._behind_a_gpu if acts.is_cuda else 0
        n_rows = len(chunk.group)
        self._gathering.chunks.append((stored, replace(chunk, acts={})))
        self._gathering.rows += n_rows
        if not self._is_cut:
            # behind a block of documents both numbers are the same, so this is where the block of this chunk begins
            self._block_begin = self._cursor.get("rows_before", 0)
        self._cursor = cursor
        self._is_cut = self._is_cut or may_be_cut(self._index, cursor)
        if self._gathering.rows >= self._shard_rows:
            self._write(is_full=True)
        self._collect(self._most_behind)
        return n_rows

    def _on_the_way(self, acts: Tensor) -> _OnTheWay:
        """Return where activations will be on the CPU; the device is not waited for."""
        if not acts.is_cuda:
            return acts, None
        staged = torch.empty(acts.shape, dtype=acts.dtype, pin_memory=True, device="cpu")
        staged.copy_(acts, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(acts.device))
        return staged, copied

    def _write(self, *, is_full: bool) -> None:
        """Begin to write what was gathered."""
        number = len(self._index.shards) + len(self._writing)
        shard = self._pool.submit(self._files, number, self._gathering)
        self._writing.append(_Writing(shard, self._cursor, self._block_begin, is_full))
        self._begin_shard()

    def _files(self, number: int, gathered: _Gathering) -> Shard:
        """Write the files of a shard; return what the index says of it."""
        tokens = [chunk for _, chunk in gathered.chunks]
        sums = {
            TOKENS_FOLDER: self._save(
                TOKENS_FOLDER,
                number,
                {
                    "token_ids": torch.cat([cast(Tensor, chunk.token_ids) for chunk in tokens]),
                    "group": torch.cat([chunk.group for chunk in tokens]),
                    "position": torch.cat([cast(Tensor, chunk.position) for chunk in tokens]),
                },
            )
        }
        for name, layout in self._layouts.items():
            parts = [_arrived(stored.pop(name)) for stored, _ in gathered.chunks]
            if layout.is_plain:
                sums[name] = self._save_parts(name, number, parts_of_rows(ACTIVATIONS, parts))
                continue
            acts = torch.cat(parts)
            stored = layout.store(acts)
            if layout.dtype == "int8":
                gathered.rounding[name].lose(acts, layout.restore(stored))
            sums[name] = self._save(name, number, layout.compress(stored))
        rounding = {name: Rounding(spread.lost, spread.variance) for name, spread in gathered.rounding.items()}
        return Shard(gathered.rows, sums, rounding)

    def _collect(self, most_behind: int) -> None:
        """Put what is written into the index; wait until no more than so many shards are not."""
        while self._writing and (len(self._writing) > most_behind or self._writing[0].shard.done()):
            writing = self._writing.popleft()
            self._index.shards.append(writing.shard.result())
            self._index.cursor = writing.cursor
            if not writing.is_full:
                return
            if self._index.marks is not None:
                marks = self._useful_marks(writing.block_begin)
                self._index.marks = [*marks, Mark(len(self._index.shards), writing.cursor)]
            if most_behind == 0 or time.monotonic() - self._written > _INDEX_SECONDS:
                self._index.write(self._directory)
                self._written = time.monotonic()

    def _useful_marks(self, block_begin: int) -> list[Mark]:
        """Return the marks from the last one on that lies before a block of documents."""
        marks = self._index.marks or []
        before = [mark for mark in marks if mark.rows <= block_begin]
        return [*before[-1:], *marks[len(before) :]]

    def _save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> int:
        return self._save_parts(kind, number, parts_of_file(tensors))

    def _save_parts(self, kind: str, number: int, parts: list[bytes | memoryview]) -> int:
        write_atomic(shard_path(self._directory, kind, number), parts)
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        return crc

    def finish(self) -> None:
        """Write what waits and mark the cache complete.

        Raises:
            DataError: nothing came.
            StorageError: the file system refused.
        """
        if self._gathering.rows:
            self._write(is_full=False)
        self._collect(0)
        if not self._index.shards:
            raise DataError(f"{self._index.settings['dataset']} gives no token to cache; give more text.")
        if self._index.marks is not None:
            self._index.marks = self._useful_marks(self._block_begin)[:1]
        self._index.complete = True
        self._index.write(self._directory)


def may_be_cut(index: CacheIndex, cursor: Cursor | None = None) -> bool:
    """Tell whether a block of documents up to a place may have been cut, so that a longer cache has more of it.

    A block is cut before a norm filter drops some of its tokens, and the next ones are read in their place. So what
    counts is how many tokens there were with those that were dropped.

    Args:
        index: of a cache.
        cursor: the place; None is where the cache ends.
    """
    limit, place = index.settings.get("max_tokens"), cursor or index.cursor or {}
    return limit is not None and place.get("rows", 0) + place.get("dropped", 0) >= limit


def _arrived(on_the_way: _OnTheWay) -> Tensor:
    """Return activations once they are there."""
    there, copied = on_the_way
    if copied is not None:
        copied.synchronize()
    return there


def parts_of_file(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return what `safetensors.torch.save` would, in parts, of which a single tensor is not copied."""
    if len(tensors) > 1:
        return [safetensors.torch.save(dict(tensors))]
    ((name, tensor),) = tensors.items()
    return parts_of_rows(name, [tensor])


def parts_of_rows(name: str, rows: Sequence[Tensor]) -> list[bytes | memoryview]:
    """Return what `safetensors.torch.save` would of a single tensor whose rows come in several, without a copy."""
    # the header that safetensors writes does not depend on what the numbers are
    size = sum(each.numel() * each.element_size() for each in rows)
    shape = [sum(map(len, rows)), *rows[0].shape[1:]]
    told = {name: {"dtype": _KINDS[rows[0].dtype], "shape": shape, "data_offsets": [0, size]}}
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    numbers = (each.contiguous().flatten().view(torch.uint8).numpy().data for each in rows)
    return [len(header).to_bytes(8, "little"), header, *numbers]

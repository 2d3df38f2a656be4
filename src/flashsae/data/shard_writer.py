"""Shards of a cache, gathered from the chunks of a source and written one after another."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.cache_index import TOKENS_FOLDER, CacheIndex, Mark, Rounding, Shard, shard_path
from flashsae.data.sources import Chunk, Cursor
from flashsae.errors import DataError
from flashsae.files import write_atomic

_ROWS_AT_ONCE = 4096


class ShardWriter:
    """Gathers chunks and writes a shard when it has enough.

    Args:
        directory: of the cache.
        index: of it; grows by each shard, and is written with it.
        shard_rows: least rows of a shard; that many rows of every hookpoint are held in memory.
    """

    def __init__(self, directory: Path, index: CacheIndex, shard_rows: int) -> None:
        self._directory = directory
        self._index = index
        self._shard_rows = shard_rows
        self._layouts = {name: index.layout(name) for name in index.settings["hookpoints"]}
        self._cursor: Cursor = index.cursor or {}
        self._block_begin = 0
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._waiting: list[Chunk] = []
        self._n_waiting = 0
        self._rounding = {name: _Spread() for name in self._layouts}

    def add(self, chunk: Chunk, cursor: Cursor) -> int:
        """Take the tokens of one forward and the cursor behind them; return how many they are."""
        stored = {}
        for name, acts in chunk.acts.items():
            layout, spread = self._layouts[name], self._rounding[name]
            if layout.dtype == "int8":
                spread.update(acts)  # what is rounded away is known with the whole shard
                stored[name] = acts.to("cpu")
                continue
            if acts.dtype != torch.bfloat16:
                spread.update(acts, acts.bfloat16())
            stored[name] = acts.to("cpu", layout.read_dtype)
        n_rows = len(chunk.group)
        self._waiting.append(replace(chunk, acts=stored))
        self._n_waiting += n_rows
        # behind a block of documents both numbers are the same, so this is where the block of this chunk begins
        self._block_begin = self._cursor.get("rows_before", 0)
        self._cursor = cursor
        if self._n_waiting >= self._shard_rows:
            self._flush()
            self._mark()
        return n_rows

    def _flush(self) -> None:
        number = len(self._index.shards)
        sums = {
            TOKENS_FOLDER: self._save(
                TOKENS_FOLDER,
                number,
                {
                    "token_ids": torch.cat([cast(Tensor, chunk.token_ids) for chunk in self._waiting]),
                    "group": torch.cat([chunk.group for chunk in self._waiting]),
                    "position": torch.cat([cast(Tensor, chunk.position) for chunk in self._waiting]),
                },
            )
        }
        for name, layout in self._layouts.items():
            acts = torch.cat([chunk.acts[name] for chunk in self._waiting])
            stored = layout.store(acts)
            if layout.dtype == "int8":
                self._rounding[name].lose(acts, layout.restore(stored))
            sums[name] = self._save(name, number, layout.compress(stored))
        rounding = {name: Rounding(spread.lost, spread.variance) for name, spread in self._rounding.items()}
        self._index.shards.append(Shard(self._n_waiting, sums, rounding))
        self._index.cursor = self._cursor
        self._begin_shard()

    def _mark(self) -> None:
        """Keep the place behind a full shard, and write the index."""
        if self._index.marks is not None:
            self._index.marks = [*self._useful_marks(), Mark(len(self._index.shards), self._cursor)]
        self._index.write(self._directory)

    def _useful_marks(self) -> list[Mark]:
        """Return the marks from the last one on that lies before the block of the last chunk."""
        marks = self._index.marks or []
        before = [mark for mark in marks if mark.rows <= self._block_begin]
        return [*before[-1:], *marks[len(before) :]]

    def _save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> int:
        data = safetensors.torch.save(tensors)
        write_atomic(shard_path(self._directory, kind, number), data)
        return zlib.crc32(data)

    def finish(self) -> None:
        """Write what waits and mark the cache complete."""
        if self._n_waiting:
            self._flush()
        if not self._index.shards:
            raise DataError(f"{self._index.settings['dataset']} gives no token to cache; give more text.")
        if self._index.marks is not None:
            self._index.marks = self._useful_marks()[:1]
        self._index.complete = True
        self._index.write(self._directory)


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

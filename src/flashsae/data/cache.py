"""Activations on disk: written once, shard by shard, and read at any row without being loaded.

    DIR/index.json                       what is in the cache, how far it got, where to go on, and checksums of all
    DIR/tokens/00000.safetensors         token_ids int32, group int64, position int32, each [n]
    DIR/<hookpoint>/00000.safetensors    activations [n, d], see data/stored.py; @ stands for the colon of an input
    DIR/tokenizer/                       to draw the text without the model

A shard ends with the chunk that fills it, so its rows depend on nothing but the settings; the index names a shard
only when all its files are in place. Whenever the writer is killed, writing again ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.data.acts import Batch, check_finite, only_site
from flashsae.data.cache_index import (
    INDEX_FILE,
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    CacheIndex,
    check_tokenizer,
    has_index,
    load_tokens,
    shard_path,
)
from flashsae.data.sources import Chunk, Cursor
from flashsae.data.split import Split, split_mask
from flashsae.data.stored import StoredRows
from flashsae.data.window import RowWindows
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files.fingerprint import text_digest
from flashsae.lm.hookpoints import OUTPUT
from flashsae.lm.place import needs_code, not_loaded, quiet_transformers
from flashsae.settings.kinds import expand
from flashsae.settings.reading import check_held_out

VERIFIED_BYTES = 64 * 10**9
"""The checksums of activations are verified when they are first read, if there are no more of them than this: reading
that much takes a disk longer than it takes a core. `flashsae cache --verify` verifies any amount."""
_KEPT_ROWS = 1 << 22
"""What is known of the tokens of no more rows than these, 64 MB, is kept in memory once it is read."""
_CHUNK_ROWS = 8192
_THREADS = 4


class ActivationCache:
    """A `RowSource` over a complete cache. Shards are mapped into memory, not loaded.

    Any number of processes may read one, also from a file system that cannot be written to: nothing is locked. Where it
    is extended meanwhile, all go on with what they opened.

    Args:
        directory: a folder that `data.cache_writer.write_cache` filled.
        hookpoint: which activations, or several of the same tokens; None where the cache has only one.
        held_out: fraction of the documents that training never sees.
        must_be_complete: refuse a cache that is not; otherwise what is there so far is read.
    Raises:
        CheckpointError: no cache, an incomplete one, a damaged or truncated shard, another format version.
        ConfigError: the cache lacks the hookpoint, or has several and none is chosen.
    """

    def __init__(
        self,
        directory: str | Path,
        hookpoint: str | Sequence[str] | None = None,
        held_out: float = 0.05,
        *,
        must_be_complete: bool = True,
    ) -> None:
        self.directory = expand(directory)
        self._held_out = check_held_out(held_out)
        self._index = index = CacheIndex.read(self.directory)
        if must_be_complete and not index.complete:
            raise CheckpointError(
                f"the activation cache {directory} is not complete ({index.rows} rows so far): finish it by "
                "writing it again with the same settings; it goes on where it stopped."
            )
        self.settings = index.settings
        self._check_split()
        self.model: str = index.settings["model"]
        self.dataset: str = index.settings["dataset"]
        self.hookpoints = self._choose(hookpoint)
        self.widths: dict[str, int] = {name: int(self.settings["hookpoints"][name]) for name in self.hookpoints}
        layouts = {name: index.layout(name) for name in self.hookpoints}
        self.dtype = layouts[self.hookpoints[0]].read_dtype
        self.is_compressed = layouts[self.hookpoints[0]].compression != "none"
        self.n_rows = index.rows
        self.name = f"{directory} ({', '.join(self.hookpoints)})"
        self._starts = [0, *accumulate(shard.rows for shard in index.shards)]
        self._verified: set[tuple[str, int]] = set()
        self._acts: dict[str, list[StoredRows]] = {}
        for name, layout in layouts.items():
            self._acts[name] = [
                StoredRows(shard_path(self.directory, name, number), layout, shard.rows)
                for number, shard in enumerate(index.shards)
            ]
            if sum(shard.file.size for shard in self._acts[name]) > VERIFIED_BYTES:
                self._verified |= {(name, number) for number in range(len(index.shards))}
        self._windows = RowWindows(self._read)
        # what a longer cache would replace is taken now; activations are mapped, and stay as they are anyway
        first = index.marks[0].shards if index.marks else len(index.shards)
        self._kept = {number: self._load_tokens(number) for number in range(first, len(index.shards))}

    @staticmethod
    def is_complete(directory: str | Path) -> bool:
        """Tell whether a folder holds a cache with nothing left to write.

        Raises:
            CheckpointError: it holds a damaged one, or one of another format.
        """
        return has_index(expand(directory)) and CacheIndex.read(expand(directory)).complete

    @staticmethod
    def read_settings(directory: str | Path) -> dict[str, Any]:
        """Return the settings that a cache was written with: model, dataset, hookpoints with their widths, ..."""
        return CacheIndex.read(expand(directory)).settings

    def _check_split(self) -> None:
        """Raise ConfigError where a model read tokens of both parts of the split in one input."""
        packed_for = self.settings.get("held_out")
        if packed_for is not None and self._held_out not in (0.0, packed_for):
            raise ConfigError(
                f"held_out: the documents in the cache {self.directory} are packed for held_out = {packed_for}, and "
                f"another part of them would share inputs of the model, got {self._held_out}. Give {packed_for}, or "
                "write another cache: flashsae train --pack --held-out FRACTION --activations FOLDER."
            )

    def _choose(self, hookpoint: str | Sequence[str] | None) -> tuple[str, ...]:
        names = list(self.settings["hookpoints"])
        if hookpoint is None and len(names) == 1:
            return tuple(names)
        asked = [hookpoint] if isinstance(hookpoint, str) else hookpoint or []
        wanted = dict.fromkeys(name.removesuffix(OUTPUT) for name in asked)
        for name in wanted or (None,):
            if name not in names:
                raise ConfigError(
                    f"hookpoint: the activation cache {self.directory} holds {', '.join(names)}; "
                    f"expected one of them, got {name!r}."
                )
        return tuple(map(str, wanted))

    @property
    def d_in(self) -> int:
        """Width of the activations of the only site."""
        return only_site(self.widths)

    @property
    def rounded_away(self) -> float:
        """What is rounded away of the activations as the model gave them, as a fraction of their variance."""
        return max(map(self._index.rounded_away, self.hookpoints))

    @property
    def stored_bytes(self) -> int:
        """Size of the activations on disk."""
        return sum(shard.file.size for shards in self._acts.values() for shard in shards)

    @property
    def stored_as(self) -> str:
        """Return how they lie there, in words."""
        return str(self.settings["dtype"]) + (", compressed" if self.is_compressed else "")

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must find again: every byte of these activations, and how they are split."""
        kinds = (TOKENS_FOLDER, *self.hookpoints)
        sums = [[shard.rows, *(shard.crc32[kind] for kind in kinds)] for shard in self._index.shards]
        hookpoint = ", ".join(self.hookpoints)
        return {"activations": text_digest([repr(sums)]), "hookpoint": hookpoint, "held_out": self._held_out}

    def read_tokenizer(self, *, trust_remote_code: bool = False) -> Any:
        """Load the tokenizer that turns `token_ids` into text again.

        Args:
            trust_remote_code: run Python code that was saved with it. Nothing in the cache can ask for that.
        Raises:
            MissingExtraError: transformers is not installed.
            CheckpointError: its files are missing or damaged, or need their code to run.
        """
        check_tokenizer(self.directory, self._index)
        with quiet_transformers() as transformers:
            try:
                return transformers.AutoTokenizer.from_pretrained(
                    self.directory / TOKENIZER_FOLDER, trust_remote_code=trust_remote_code
                )
            except Exception as error:  # whatever the library makes of files of another version of itself
                if needs_code(error):
                    raise not_loaded(f"the tokenizer of {self.directory}", error) from error
                raise CheckpointError(
                    f"cannot read the tokenizer in {self.directory / TOKENIZER_FOLDER} ({str(error)[:200]}). Install "
                    "the version of transformers that wrote it, or write the cache again."
                ) from error

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""
        shards = range(len(self._index.shards))
        masks = [split_mask(self._tokens(number)["group"], self._held_out, split) for number in shards]
        return torch.cat(masks).nonzero()[:, 0]

    def rows(self, index: Tensor) -> Batch:
        """Return rows by number: index [n], int64, in any order -> [n, d] by site, copies; not checked for NaN.

        Raises:
            DataError: a number is out of range.
            CheckpointError: a shard that is read for the first time is damaged.
        """
        wanted, order = index.cpu().sort(stable=True)  # each shard is visited once, and read forwards
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.n_rows:
            raise DataError(f"{self.name} has rows 0 to {self.n_rows - 1}, got {wanted[0]} to {wanted[-1]}.")
        batch = {}
        for name in self.widths:
            out = batch[name] = torch.empty(len(wanted), self.widths[name], dtype=self.dtype, device="cpu")
            for place, rows in self._windows.rows(name, wanted):
                out.index_copy_(0, order[place], rows)
        return batch

    def expect(self, index: Tensor, reader: object) -> None:
        """Be told which rows somebody will ask for next, in any order; those of a compressed cache are held ready.

        Args:
            index: [n], int64. They are read when the first of them is asked for.
            reader: who; what it expected before is given up, and all of it when it is no more.
        """
        if self.is_compressed:
            self._windows.expect(index, reader)

    def _read(self, name: str, wanted: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows from the disk, shard by shard: wanted [n], ascending -> which of them, and [m, d]."""
        bounds = torch.searchsorted(wanted, torch.tensor(self._starts, dtype=torch.int64, device="cpu")).tolist()
        shards = [(n, slice(low, high)) for n, (low, high) in enumerate(pairwise(bounds)) if low < high]
        self._verify(name, [n for n, _ in shards])

        def read(shard: tuple[int, slice]) -> tuple[slice, Tensor]:
            n, place = shard
            return place, self._acts[name][n].read(wanted[place] - self._starts[n])

        if not self.is_compressed or len(shards) < 2:
            yield from map(read, shards)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from pool.map(read, shards)

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in the order of writing.

        Raises:
            DataError: activations are NaN or Inf.
            CheckpointError: a shard that is read for the first time is missing or damaged.
        """
        first = (cursor or {}).get("row", 0)
        for number in range(len(self._index.shards)):
            start, stop = self._starts[number], self._starts[number + 1]
            if stop <= first:
                continue
            tokens = self._tokens(number)
            for row in range(max(start, first), stop, _CHUNK_ROWS):
                end = min(row + _CHUNK_ROWS, stop)
                group, ids, position = (
                    tokens[name][row - start : end - start] for name in ("group", "token_ids", "position")
                )
                acts = self.rows(torch.arange(row, end, dtype=torch.int64, device="cpu"))
                for name, each in acts.items():
                    where = "" if len(acts) == 1 else f" at {name}"
                    check_finite(each, f"{self.name}{where}, counted from row {row}")
                chunk = Chunk(acts, group, ids, position)
                yield chunk.select(split_mask(group, self._held_out, split)), {"row": end}

    def _tokens(self, number: int) -> dict[str, Tensor]:
        """Return what is known of the tokens of a shard: `token_ids`, `group` and `position`, [n] each."""
        if number in self._kept:
            return self._kept[number]
        tokens = self._load_tokens(number)
        if self.n_rows <= _KEPT_ROWS:
            self._kept[number] = tokens
        return tokens

    def _load_tokens(self, number: int) -> dict[str, Tensor]:
        return load_tokens(self.directory, self._index, number)

    def _verify(self, name: str, numbers: list[int]) -> None:
        """Compare the activations of shards with their checksums, each once."""
        new = [number for number in numbers if (name, number) not in self._verified]
        if new:
            sums = self._index.shards
            with ThreadPoolExecutor(min(_THREADS, len(new))) as pool:
                list(pool.map(lambda n: self._acts[name][n].file.check(sums[n].crc32[name], INDEX_FILE), new))
            self._verified |= {(name, number) for number in new}

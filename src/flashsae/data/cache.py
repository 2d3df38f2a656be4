"""Activations on disk: written once, shard by shard, and read at any row without being loaded.

    DIR/index.json                       what is in the cache, how far it got, where to go on
    DIR/tokens/00000.safetensors         token_ids int32, group int64, position int32, each [n]
    DIR/<hookpoint>/00000.safetensors    activations [n, d] bfloat16
    DIR/tokenizer/                       to draw the text without the model

A shard ends with the chunk that fills it, so its rows depend on nothing but the settings; the index names a shard
only when all its files are in place. Whenever the writer is killed, writing again ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.data.acts import check_finite
from flashsae.data.models import quiet_transformers
from flashsae.data.sources import Chunk, Cursor, Split, check_held_out, split_mask
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files import load_manifest, load_tensors, write_atomic

INDEX_FILE = "index.json"
TOKENS_FOLDER, TOKENIZER_FOLDER = "tokens", "tokenizer"
"""The folders of a cache that are not named after a hookpoint."""

_FORMAT = "flashsae.activations"
_VERSION = 1
_CHUNK_ROWS = 8192


@dataclass
class CacheIndex:
    """The content of index.json, the truth about a cache: what it does not name is not there.

    Args:
        settings: what decides the bytes of the shards.
        shards: rows of each shard.
        cursor: of the source, behind the last shard; None before the first.
        complete: nothing is left to write.
    """

    settings: dict[str, Any]
    shards: list[int] = field(default_factory=list)
    cursor: Cursor | None = None
    complete: bool = False

    def write(self, directory: Path) -> None:
        """Write index.json, whole or not at all; raises StorageError where the file system refuses."""
        version = installed_version("flashsae")
        content = {"format": _FORMAT, "format_version": _VERSION, "flashsae_version": version, **vars(self)}
        write_atomic(directory / INDEX_FILE, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(directory: Path) -> CacheIndex:
        """Read index.json.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of something else or of another format version.
        """
        path = directory / INDEX_FILE
        content = load_manifest(path, _FORMAT, _VERSION)
        try:
            return CacheIndex(*(content[name] for name in ("settings", "shards", "cursor", "complete")))
        except KeyError as error:
            raise CheckpointError(f"{path} is damaged: it lacks {error}. Write the cache again.") from error


def shard_path(directory: Path, kind: str, number: int) -> Path:
    """Return where a shard lies; `kind` is a hookpoint or `TOKENS_FOLDER`."""
    return directory / kind / f"{number:05d}.safetensors"


class ActivationCache:
    """A `RowSource` over a complete cache. Shards are mapped into memory, not loaded.

    Args:
        directory: a folder that `data.cache_writer.write_cache` filled.
        hookpoint: which activations; None where the cache has only one.
        held_out: fraction of the documents that training never sees.
    Raises:
        CheckpointError: no cache, an incomplete one, a damaged or truncated shard, another format version.
        ConfigError: the cache lacks the hookpoint, or has several and none is chosen.
    """

    def __init__(self, directory: str | Path, hookpoint: str | None = None, held_out: float = 0.05) -> None:
        self.directory = Path(directory)
        self._held_out = check_held_out(held_out)
        index = CacheIndex.read(self.directory)
        if not index.complete:
            raise CheckpointError(
                f"the activation cache {directory} is not complete ({sum(index.shards)} rows so far): finish it by "
                "writing it again with the same settings; it goes on where it stopped."
            )
        self.settings = index.settings
        self.model: str = index.settings["model"]
        self.dataset: str = index.settings["dataset"]
        self.hookpoint = self._choose(hookpoint)
        self.n_rows = sum(index.shards)
        self.name = f"{directory} ({self.hookpoint})"
        self._starts = [0, *accumulate(index.shards)]
        self._acts = [
            _map_bfloat16(shard_path(self.directory, self.hookpoint, number), (n_rows, self.d_in))
            for number, n_rows in enumerate(index.shards)
        ]

    @staticmethod
    def is_complete(directory: str | Path) -> bool:
        """Tell whether a folder holds a cache with nothing left to write.

        Raises:
            CheckpointError: it holds a damaged one, or one of another format.
        """
        directory = Path(directory)
        return (directory / INDEX_FILE).exists() and CacheIndex.read(directory).complete

    @staticmethod
    def read_settings(directory: str | Path) -> dict[str, Any]:
        """Return the settings that a cache was written with: model, dataset, hookpoints with their widths, ..."""
        return CacheIndex.read(Path(directory)).settings

    def _choose(self, hookpoint: str | None) -> str:
        names = list(self.settings["hookpoints"])
        if hookpoint is None and len(names) == 1:
            return str(names[0])
        if hookpoint not in names:
            raise ConfigError(
                f"hookpoint: the activation cache {self.directory} holds {', '.join(names)}; "
                f"expected one of them, got {hookpoint!r}."
            )
        return str(hookpoint)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.settings["hookpoints"][self.hookpoint])

    def read_tokenizer(self) -> Any:
        """Load the tokenizer that turns `token_ids` into text again.

        Raises:
            MissingExtraError: transformers is not installed.
        """
        with quiet_transformers() as transformers:
            return transformers.AutoTokenizer.from_pretrained(self.directory / TOKENIZER_FOLDER)

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""
        masks = [split_mask(self._tokens(number)["group"], self._held_out, split) for number in range(len(self._acts))]
        return torch.cat(masks).nonzero()[:, 0]

    def rows(self, index: Tensor) -> Tensor:
        """Return rows by number: index [n], int64, in any order -> [n, d_in], bfloat16, a copy; not checked for NaN.

        Raises:
            DataError: a number is out of range.
        """
        wanted, order = index.cpu().sort(stable=True)  # each shard is visited once, and read forwards
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.n_rows:
            raise DataError(f"{self.name} has rows 0 to {self.n_rows - 1}, got {wanted[0]} to {wanted[-1]}.")
        bounds = torch.searchsorted(wanted, torch.tensor(self._starts)).tolist()
        out = torch.empty(len(wanted), self.d_in, dtype=torch.bfloat16)
        for acts, start, low, high in zip(self._acts, self._starts, bounds, bounds[1:]):
            if low < high:
                out.index_copy_(0, order[low:high], acts.index_select(0, wanted[low:high] - start))
        return out

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in the order of writing.

        Raises:
            DataError: activations are NaN or Inf.
            CheckpointError: the tokens of a shard are missing or damaged.
        """
        first = (cursor or {"row": 0})["row"]
        for number in range(len(self._acts)):
            start, stop = self._starts[number], self._starts[number + 1]
            if stop <= first:
                continue
            tokens = self._tokens(number)
            for row in range(max(start, first), stop, _CHUNK_ROWS):
                end = min(row + _CHUNK_ROWS, stop)
                group, ids, position = (
                    tokens[name][row - start : end - start] for name in ("group", "token_ids", "position")
                )
                acts = self.rows(torch.arange(row, end))
                check_finite(acts, f"{self.name}, counted from row {row}")
                chunk = Chunk(acts, group, ids, position)
                yield chunk.select(split_mask(group, self._held_out, split)), {"row": end}

    def _tokens(self, number: int) -> dict[str, Tensor]:
        path = shard_path(self.directory, TOKENS_FOLDER, number)
        tokens = load_tensors(path)
        expected = self._starts[number + 1] - self._starts[number]
        if {name: len(tensor) for name, tensor in tokens.items()} != dict.fromkeys(
            ("token_ids", "group", "position"), expected
        ):
            raise CheckpointError(f"{path} is damaged: it does not hold the {expected} tokens of the index.")
        return tokens


def _map_bfloat16(path: Path, shape: tuple[int, int]) -> Tensor:
    """Map the activations of a shard. Copy on write: torch wants an array that may be written, and nothing here writes.

    Raises:
        CheckpointError: the file is missing, is truncated, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
        found = header.get("activations", {})
        if (found.get("dtype"), found.get("shape")) != ("BF16", list(shape)):
            raise ValueError(f"expected bfloat16 activations of shape {list(shape)}")
        offset = 8 + length + found["data_offsets"][0]
        if path.stat().st_size != offset + 2 * shape[0] * shape[1]:
            raise ValueError("its length is wrong")
        return torch.from_numpy(np.memmap(path, np.int16, "c", offset, shape)).view(torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the shard {path}: {error}. Write the cache again into another folder."
        ) from error

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
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.language_model import LanguageModelSource, quiet_transformers
from flashsae.data.sources import Chunk, Cursor, Split, check_finite, check_held_out, split_mask
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files import atomic_directory, load_json, load_tensors, storage_errors, write_atomic

_FORMAT = "flashsae-activations"
_VERSION = 1
_TOKENS, _TOKENIZER = "tokens", "tokenizer"
_CHUNK_ROWS = 8192


@dataclass
class _Index:
    """The content of index.json.

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
        version = installed_version("flashsae")
        content = {"format": _FORMAT, "version": _VERSION, "flashsae_version": version, **vars(self)}
        write_atomic(directory / "index.json", json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(directory: Path) -> _Index:
        path = directory / "index.json"
        content = load_json(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not the index of an activation cache of FlashSAE.")
        if content.get("version") != _VERSION:
            raise CheckpointError(
                f"{path}: this FlashSAE reads version {_VERSION} of the cache format, got version "
                f"{content.get('version')}; write the cache again, or use the FlashSAE that wrote it "
                f"({content.get('flashsae_version')})."
            )
        try:
            return _Index(*(content[name] for name in ("settings", "shards", "cursor", "complete")))
        except KeyError as error:
            raise CheckpointError(f"{path} is damaged: it lacks {error}. Write the cache again.") from error


def _shard_path(directory: Path, kind: str, number: int) -> Path:
    return directory / kind / f"{number:05d}.safetensors"


# --- writing


def write_cache(
    directory: str | Path,
    source: LanguageModelSource,
    *,
    shard_rows: int = 32768,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the activations of all documents of both splits; go on where an earlier call was interrupted.

    Args:
        directory: new, empty, or a cache begun with the same settings; a complete one is left as it is.
        source: its hookpoints are all written, from one pass of the model. Its held-out fraction plays no part:
            the split is made when the cache is read.
        shard_rows: least rows of a shard; that many rows of every hookpoint are held in memory.
        max_tokens: stop after so many rows; None reads the source to its end.
        on_progress: called with the rows so far after each forward; those of an earlier call count.
    Raises:
        ConfigError: shard_rows or max_tokens is not positive, or a hookpoint's name is taken by a folder of ours.
        CheckpointError: `directory` exists and is not a cache.
        DataError: the cache was begun with other settings, or the source yields nothing.
        StorageError: the file system refused; the cache can be gone on with.
    """
    directory = Path(directory)
    settings = _settings(source, shard_rows, max_tokens)
    index = _begin(directory, settings)
    if index.complete:
        return
    if not (directory / _TOKENIZER).exists():
        with atomic_directory(directory / _TOKENIZER) as aside:
            source.tokenizer.save_pretrained(aside)
    writer = _Writer(directory, index, shard_rows)
    n_rows = sum(index.shards)
    for chunks, cursor in source.chunks_by_hookpoint(None, index.cursor):
        room = None if max_tokens is None else max_tokens - n_rows
        n_rows += writer.add({name: chunk.select(_first(chunk, room)) for name, chunk in chunks.items()}, cursor)
        if on_progress is not None:
            on_progress(n_rows)
        if n_rows == max_tokens:
            break
    writer.finish()


def _first(chunk: Chunk, n: int | None) -> Tensor:
    return torch.arange(len(chunk.acts) if n is None else min(n, len(chunk.acts)))


def _settings(source: LanguageModelSource, shard_rows: int, max_tokens: int | None) -> dict[str, Any]:
    for name, value in (("shard_rows", shard_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
    taken = sorted({_TOKENS, _TOKENIZER}.intersection(source.hookpoints))
    if taken:
        raise ConfigError(f"hookpoints: a cache has a folder {taken[0]!r} of its own; leave that module out.")
    config = source.config
    return {
        "model": config.model,
        "dataset": source.text.name,
        "hookpoints": source.widths,
        "dtype": "bfloat16",
        "model_dtype": str(source.dtype).removeprefix("torch."),
        "context_length": config.context_length,
        "batch_tokens": config.batch_tokens,
        "mask_special": config.mask_special,
        "max_norm_ratio": config.max_norm_ratio,
        "max_documents": config.max_documents,
        "max_tokens": max_tokens,
        "shard_rows": shard_rows,
    }


def _begin(directory: Path, settings: dict[str, Any]) -> _Index:
    """Return the index to go on from; clear what a kill left half written, in a cache of ours only."""
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        foreign = [path for path in directory.iterdir() if not path.match(".index.json.*.partial")]
        if foreign and not (directory / "index.json").exists():
            raise CheckpointError(
                f"{directory} holds other files and no index.json: it is no activation cache. Choose a new folder."
            )
        if not foreign:
            _Index(settings).write(directory)
    index = _Index.read(directory)
    names = [name for name in {**index.settings, **settings} if index.settings.get(name) != settings.get(name)]
    if names:
        differences = "; ".join(
            f"{name} is {index.settings.get(name)!r} there and {settings.get(name)!r} here" for name in names
        )
        raise DataError(
            f"the activation cache {directory} was written with other settings: {differences}. Use the same settings, "
            "choose another folder, or remove that one."
        )
    with storage_errors(directory):
        for kind in (_TOKENS, *settings["hookpoints"]):
            (directory / kind).mkdir(exist_ok=True)
        for stray in directory.rglob(".*.partial"):
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    return index


class _Writer:
    """Gathers chunks and writes a shard when it has enough."""

    def __init__(self, directory: Path, index: _Index, shard_rows: int) -> None:
        self._directory = directory
        self._index = index
        self._shard_rows = shard_rows
        self._waiting: list[dict[str, Chunk]] = []
        self._n_waiting = 0

    def add(self, chunks: dict[str, Chunk], cursor: Cursor) -> int:
        """Take the chunks of one forward and the cursor behind them; return how many rows they are."""
        stored = {
            name: Chunk(chunk.acts.to("cpu", torch.bfloat16), chunk.group, chunk.token_ids, chunk.position)
            for name, chunk in chunks.items()
        }
        n_rows = len(next(iter(stored.values())).acts)
        self._waiting.append(stored)
        self._n_waiting += n_rows
        self._cursor = cursor
        if self._n_waiting >= self._shard_rows:
            self._flush()
        return n_rows

    def _flush(self) -> None:
        number = len(self._index.shards)
        hookpoints = list(self._index.settings["hookpoints"])
        tokens = [chunks[hookpoints[0]] for chunks in self._waiting]
        self._save(
            _TOKENS,
            number,
            {
                "token_ids": torch.cat([cast(Tensor, chunk.token_ids) for chunk in tokens]),
                "group": torch.cat([chunk.group for chunk in tokens]),
                "position": torch.cat([cast(Tensor, chunk.position) for chunk in tokens]),
            },
        )
        for name in hookpoints:
            acts = torch.cat([chunks[name].acts for chunks in self._waiting])
            self._save(name, number, {"activations": acts})
        self._index.shards.append(self._n_waiting)
        self._index.cursor = self._cursor
        self._index.write(self._directory)
        self._waiting, self._n_waiting = [], 0

    def _save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        write_atomic(_shard_path(self._directory, kind, number), safetensors.torch.save(tensors))

    def finish(self) -> None:
        """Write what waits and mark the cache complete."""
        if self._n_waiting:
            self._flush()
        if not self._index.shards:
            raise DataError(f"{self._index.settings['dataset']} gives no token to cache; give more text.")
        self._index.complete = True
        self._index.write(self._directory)


# --- reading


class ActivationCache:
    """A `RowSource` over a complete cache. Shards are mapped into memory, not loaded.

    Args:
        directory: a folder that `write_cache` filled.
        hookpoint: which activations; None where the cache has only one.
        held_out: fraction of the documents that training never sees.
    Raises:
        CheckpointError: no cache, an incomplete one, a damaged or truncated shard, another format version.
        ConfigError: the cache lacks the hookpoint, or has several and none is chosen.
    """

    def __init__(self, directory: str | Path, hookpoint: str | None = None, held_out: float = 0.05) -> None:
        self.directory = Path(directory)
        self._held_out = check_held_out(held_out)
        index = _Index.read(self.directory)
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
        self._starts = np.array([0, *accumulate(index.shards)])
        self._acts = [
            _map_bfloat16(_shard_path(self.directory, self.hookpoint, number), (n_rows, self.d_in))
            for number, n_rows in enumerate(index.shards)
        ]

    @staticmethod
    def is_complete(directory: str | Path) -> bool:
        """Tell whether a folder holds a cache with nothing left to write.

        Raises:
            CheckpointError: it holds a damaged one, or one of another format.
        """
        directory = Path(directory)
        return (directory / "index.json").exists() and _Index.read(directory).complete

    @staticmethod
    def read_settings(directory: str | Path) -> dict[str, Any]:
        """Return the settings that a cache was written with: model, dataset, hookpoints with their widths, ..."""
        return _Index.read(Path(directory)).settings

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

    def describe(self) -> str:
        """Say in a line what the cache holds."""
        return (
            f"{self.n_rows} activations of width {self.d_in}: {self.model} at {self.hookpoint} reading {self.dataset}"
        )

    def read_tokenizer(self) -> Any:
        """Load the tokenizer that turns `token_ids` into text again.

        Raises:
            MissingExtraError: transformers is not installed.
        """
        with quiet_transformers() as transformers:
            return transformers.AutoTokenizer.from_pretrained(self.directory / _TOKENIZER)

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""
        masks = [split_mask(self._tokens(number)["group"], self._held_out, split) for number in range(len(self._acts))]
        return torch.cat(masks).nonzero()[:, 0]

    def rows(self, index: Tensor) -> Tensor:
        """Return rows by number: index [n], int64, in any order -> [n, d_in], bfloat16, a copy."""
        wanted = index.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.n_rows:
            raise DataError(f"{self.name} has rows 0 to {self.n_rows - 1}, got {wanted.min()} to {wanted.max()}.")
        order = wanted.argsort(kind="stable")  # each shard is visited once, and read forwards
        bounds = np.searchsorted(wanted[order], self._starts)
        out = np.empty((len(wanted), self.d_in), np.int16)
        for number, acts in enumerate(self._acts):
            here = order[bounds[number] : bounds[number + 1]]
            if len(here):
                out[here] = acts[wanted[here] - self._starts[number]]
        rows = torch.from_numpy(out).view(torch.bfloat16)
        check_finite(rows, f"rows {index[:3].tolist()}... of {self.name}")
        return rows

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in the order of writing."""
        first = (cursor or {"row": 0})["row"]
        for number in range(len(self._acts)):
            start, stop = int(self._starts[number]), int(self._starts[number + 1])
            if stop <= first:
                continue
            tokens = self._tokens(number)
            for row in range(max(start, first), stop, _CHUNK_ROWS):
                end = min(row + _CHUNK_ROWS, stop)
                group, ids, position = (
                    tokens[name][row - start : end - start] for name in ("group", "token_ids", "position")
                )
                chunk = Chunk(self.rows(torch.arange(row, end)), group, ids, position)
                yield chunk.select(split_mask(group, self._held_out, split)), {"row": end}

    def _tokens(self, number: int) -> dict[str, Tensor]:
        path = _shard_path(self.directory, _TOKENS, number)
        tokens = load_tensors(path)
        expected = int(self._starts[number + 1] - self._starts[number])
        if {name: len(tensor) for name, tensor in tokens.items()} != dict.fromkeys(
            ("token_ids", "group", "position"), expected
        ):
            raise CheckpointError(f"{path} is damaged: it does not hold the {expected} tokens of the index.")
        return tokens


def _map_bfloat16(path: Path, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Map the activations of a shard as int16, which numpy has and bfloat16 it has not.

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
        return np.memmap(path, np.int16, "r", offset, shape)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the shard {path}: {error}. Write the cache again into another folder."
        ) from error

"""Writing a cache of activations: shard by shard from one pass of the model, and on from wherever a kill left it.

The layout on disk, and the promise that writing again ends with the same bytes, stand in `data/cache.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.cache import INDEX_FILE, TOKENIZER_FOLDER, TOKENS_FOLDER, CacheIndex, shard_path
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import Chunk, Cursor
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files import atomic_directory, only_one, storage_errors, write_atomic


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
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with only_one(directory, wait=True):  # another run may be writing the very same cache: then it is there for both
        _write(directory, source, settings, on_progress)


def _write(
    directory: Path,
    source: LanguageModelSource,
    settings: dict[str, Any],
    on_progress: Callable[[int], None] | None,
) -> None:
    shard_rows, max_tokens = settings["shard_rows"], settings["max_tokens"]
    index = _begin(directory, settings)
    if index.complete:
        return
    if not (directory / TOKENIZER_FOLDER).exists():
        with atomic_directory(directory / TOKENIZER_FOLDER) as aside:
            source.tokenizer.save_pretrained(aside)
    writer = _Writer(directory, index, shard_rows)
    n_rows = sum(index.shards)
    for chunks, cursor in source.chunks_by_hookpoint(None, index.cursor, max_tokens):
        n_rows += writer.add(chunks, cursor)
        if on_progress is not None:
            on_progress(n_rows)
    writer.finish()


def _settings(source: LanguageModelSource, shard_rows: int, max_tokens: int | None) -> dict[str, Any]:
    for name, value in (("shard_rows", shard_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
    taken = sorted({TOKENS_FOLDER, TOKENIZER_FOLDER}.intersection(source.hookpoints))
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
        "skip_first": config.skip_first,
        "exclude_ids": list(config.exclude_ids),
        "prepend_bos": config.prepend_bos,
        "shuffle_documents": config.shuffle_documents,
        "document_seed": config.document_seed,
        "max_documents": config.max_documents,
        "max_tokens": max_tokens,
        "shard_rows": shard_rows,
    }


def _begin(directory: Path, settings: dict[str, Any]) -> CacheIndex:
    """Return the index to go on from; clear what a kill left half written, in a cache of ours only."""
    with storage_errors(directory):
        foreign = [path for path in directory.iterdir() if not path.match(".index.json.*.partial")]
        if foreign and not (directory / INDEX_FILE).exists():
            raise CheckpointError(
                f"{directory} holds other files and no index.json: it is no activation cache. Choose a new folder."
            )
        if not foreign:
            CacheIndex(settings).write(directory)
    index = CacheIndex.read(directory)
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
        for kind in (TOKENS_FOLDER, *settings["hookpoints"]):
            (directory / kind).mkdir(exist_ok=True)
        for stray in directory.rglob(".*.partial"):
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    return index


class _Writer:
    """Gathers chunks and writes a shard when it has enough."""

    def __init__(self, directory: Path, index: CacheIndex, shard_rows: int) -> None:
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
            TOKENS_FOLDER,
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
        write_atomic(shard_path(self._directory, kind, number), safetensors.torch.save(tensors))

    def finish(self) -> None:
        """Write what waits and mark the cache complete."""
        if self._n_waiting:
            self._flush()
        if not self._index.shards:
            raise DataError(f"{self._index.settings['dataset']} gives no token to cache; give more text.")
        self._index.complete = True
        self._index.write(self._directory)

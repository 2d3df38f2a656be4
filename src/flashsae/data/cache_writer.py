"""Writing a cache of activations: shard by shard from one pass of the model, and on from wherever a kill left it.

The layout on disk, and the promise that writing again ends with the same bytes, stand in `data/cache.py`.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor

from flashsae.data.cache_index import (
    DTYPES,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    CacheIndex,
    CacheSettings,
    Rounding,
    Shard,
    folder_crc32,
    shard_path,
)
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import Chunk, Cursor
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files import atomic_directory, clear_leftovers, only_one, storage_errors, write_atomic
from flashsae.lm.hookpoints import folder_of
from flashsae.schema import parse
from flashsae.settings.kinds import expand
from flashsae.settings.reading import defaults_of_later

CacheDtype = Literal["bf16", "float32"]
SHARD_ROWS = 32768
DTYPE_NAMES: dict[str, str] = {"bf16": "bfloat16", "float32": "float32"}


def write_cache(
    directory: str | Path,
    source: LanguageModelSource,
    *,
    shard_rows: int = SHARD_ROWS,
    max_tokens: int | None = None,
    dtype: CacheDtype = "bf16",
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the activations of all documents of both splits; continue a cache that is not complete.

    Args:
        directory: new, empty, or a cache that is not complete, of the same settings; a complete one is left as it is.
        source: its hookpoints are all written, from one pass of the model. Its held-out fraction plays no part, as
            the split is made when the cache is read, except where documents are packed: only those of one part of
            the split share an input of the model.
        shard_rows: least rows of a shard; that many rows of every hookpoint are held in memory.
        max_tokens: stop after so many rows; None reads the source to its end.
        dtype: of the activations on disk. bf16 rounds away what the index tells: little, unless their mean is far
            larger than their spread.
        on_progress: called with the rows so far after each forward; those of an earlier call count.
    Raises:
        ConfigError: shard_rows or max_tokens is not positive, a hookpoint's name is taken by a folder of ours, or is
            no name for a folder.
        CheckpointError: `directory` exists and is not a cache.
        DataError: the cache in `directory` has other settings, or the source yields nothing.
        StorageError: the file system refused; another call continues the cache.
    """
    directory = expand(directory)
    settings = cache_settings(source, shard_rows, max_tokens, dtype)
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
    if index.tokenizer is None:
        with atomic_directory(directory / TOKENIZER_FOLDER, overwrite=True) as aside:
            source.tokenizer.save_pretrained(aside)
        index.tokenizer = folder_crc32(directory / TOKENIZER_FOLDER)
        index.write(directory)
    writer = _Writer(directory, index, shard_rows)
    n_rows = index.rows
    for chunk, cursor in source.chunks(None, index.cursor, max_tokens):
        n_rows += writer.add(chunk, cursor)
        if on_progress is not None:
            on_progress(n_rows)
    writer.finish()


def cache_settings(
    source: LanguageModelSource, shard_rows: int, max_tokens: int | None, dtype: CacheDtype
) -> dict[str, Any]:
    """Return what decides the bytes of a cache, as its index holds it; arguments and errors as `write_cache`."""
    for name, value in (("shard_rows", shard_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {dtype!r}.")
    taken = sorted({TOKENS_FOLDER, TOKENIZER_FOLDER}.intersection(source.hookpoints))
    if taken:
        raise ConfigError(f"hookpoints: a cache has a folder {taken[0]!r} of its own; leave that module out.")
    settings = {
        **source.config.of_tokens(),
        **({"held_out": source.identity["held_out"]} if source.config.pack else {}),  # it decides what stands together
        "model": source.config.model,
        "dataset": source.text.name,
        "model_fingerprint": source.identity["model"],
        "text_fingerprint": source.identity["text"],
        "hookpoints": source.widths,
        "dtype": DTYPE_NAMES[dtype],
        "model_dtype": str(source.dtype).removeprefix("torch."),
        "max_tokens": max_tokens,
        "shard_rows": shard_rows,
    }
    try:
        parse(CacheSettings, settings, "", "")
    except CheckpointError as error:
        raise ConfigError(f"hookpoints: cannot name the folders of a cache after them ({error}).") from error
    return dict(json.loads(json.dumps(settings)))


def _begin(directory: Path, settings: dict[str, Any]) -> CacheIndex:
    """Return the index to continue; clear what a kill left half written, in a cache of ours only."""
    with storage_errors(directory):
        foreign = [path for path in directory.iterdir() if not path.match(f".{INDEX_FILE}.*.partial")]
    if foreign and not (directory / INDEX_FILE).exists():
        raise CheckpointError(
            f"{directory} holds other files and no index.json: it is no activation cache. Choose a new folder."
        )
    if not foreign:
        CacheIndex(settings).write(directory)
    index = CacheIndex.read(directory)
    differences = changes(index.settings, settings)
    if differences and not index.shards:  # nothing was written yet, so nothing is lost
        with storage_errors(directory):
            for kind in (TOKENS_FOLDER, TOKENIZER_FOLDER, *index.settings["hookpoints"]):
                shutil.rmtree(directory / folder_of(kind), ignore_errors=True)
        index, differences = CacheIndex(settings), []
        index.write(directory)
    if differences:
        raise DataError(
            f"the activation cache {directory} was written with other settings: {'; '.join(differences)}. Use the same "
            "settings, choose another folder, or remove that one."
        )
    clear_leftovers(directory)
    with storage_errors(directory):
        for kind in (TOKENS_FOLDER, *settings["hookpoints"]):
            (directory / folder_of(kind)).mkdir(exist_ok=True)
    return index


def changes(there: dict[str, Any], here: dict[str, Any], is_here: str = " and {!r} here") -> list[str]:
    """Say what of the settings of a cache is not as it is wanted; what was only moved to another place is the same."""
    untold = defaults_of_later()
    there, here = ({name: each.get(name, untold.get(name)) for name in {**there, **here}} for each in (there, here))
    names = [name for name in here if there[name] != here[name]]
    if "text_fingerprint" not in names and "dataset" in names:
        names.remove("dataset")  # its name tells the place
    if "model_fingerprint" not in names and "model" in names and _last(there["model"]) == _last(here["model"]):
        names.remove("model")
    words = {"text_fingerprint": "the text", "model_fingerprint": "the model (weights or tokenizer)"}
    told = {"text_fingerprint": "dataset", "model_fingerprint": "model"}
    return [
        f"{words[name]} was changed since"
        if name in words
        else f"{name} is {there[name]!r} there{is_here.format(here[name])}"
        for name in names
        if told.get(name) not in names  # another name says more
    ]


def _last(place: str) -> str:
    return Path(place).name


class _Writer:
    """Gathers chunks and writes a shard when it has enough."""

    def __init__(self, directory: Path, index: CacheIndex, shard_rows: int) -> None:
        self._directory = directory
        self._index = index
        self._shard_rows = shard_rows
        self._dtype = DTYPES[index.settings["dtype"]]
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._waiting: list[Chunk] = []
        self._n_waiting = 0
        self._rounding = {name: _Spread() for name in self._index.settings["hookpoints"]}

    def add(self, chunk: Chunk, cursor: Cursor) -> int:
        """Take the tokens of one forward and the cursor behind them; return how many they are."""
        for name, acts in chunk.acts.items():
            if acts.dtype != torch.bfloat16:
                self._rounding[name].update(acts)
        stored = {name: acts.to("cpu", self._dtype) for name, acts in chunk.acts.items()}
        n_rows = len(chunk.group)
        self._waiting.append(replace(chunk, acts=stored))
        self._n_waiting += n_rows
        self._cursor = cursor
        if self._n_waiting >= self._shard_rows:
            self._flush()
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
        for name in self._rounding:
            acts = torch.cat([chunk.acts[name] for chunk in self._waiting])
            sums[name] = self._save(name, number, {"activations": acts})
        rounding = {name: Rounding(spread.lost, spread.variance) for name, spread in self._rounding.items()}
        self._index.shards.append(Shard(self._n_waiting, sums, rounding))
        self._index.cursor = self._cursor
        self._index.write(self._directory)
        self._begin_shard()

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
        self._index.complete = True
        self._index.write(self._directory)


class _Spread:
    """What bfloat16 rounds away of activations, and their variance, summed in float64 chunk by chunk.

    Source: Chan, Golub and LeVeque 1979, for variances of parts.
    """

    def __init__(self) -> None:
        self.lost = self.variance = 0.0
        self._rows = 0
        self._mean = torch.zeros(0, dtype=torch.float32, device="cpu")

    def update(self, x: Tensor) -> None:
        """Add a chunk: [n, d]."""
        if len(x) == 0:
            return
        x64 = x.double()
        mean = x64.mean(0)
        self.lost += (x64 - x.bfloat16().double()).square().sum().item()
        self.variance += (x64 - mean).square().sum().item()
        if self._rows:
            share = len(x) / (self._rows + len(x))
            self.variance += (mean - self._mean).square().sum().item() * self._rows * share
            mean = self._mean + (mean - self._mean) * share
        self._rows, self._mean = self._rows + len(x), mean

"""Writing a cache of activations: shard by shard from one pass of the model, and on from wherever a kill left it.

The layout on disk, and the promise that writing again ends with the same bytes, stand in `data/cache.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from flashsae.data.cache_index import (
    INDEX_FILE,
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    CacheIndex,
    CacheSettings,
    folder_crc32,
)
from flashsae.data.images import IMAGES, ImageSource
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shard_writer import ShardWriter, may_be_cut
from flashsae.data.stored import Compression, Layout, StoredDtype
from flashsae.errors import CheckpointError, ConfigError, DataError, require
from flashsae.files.atomic import atomic_directory, clear_leftovers, only_one, storage_errors
from flashsae.files.schema import parse
from flashsae.lm.hookpoints import folder_of
from flashsae.settings.kinds import expand
from flashsae.settings.reading import defaults_of_later

CacheDtype = Literal["bf16", "float32", "int8"]
SHARD_ROWS = 32768
_NO_LIMIT = 2**62
DTYPE_NAMES: dict[str, StoredDtype] = {"bf16": "bfloat16", "float32": "float32", "int8": "int8"}


def write_cache(
    directory: str | Path,
    source: LanguageModelSource | ImageSource,
    *,
    shard_rows: int = SHARD_ROWS,
    max_tokens: int | None = None,
    dtype: CacheDtype = "bf16",
    compression: Compression = "none",
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the activations of all documents of both splits; continue a cache that is not complete.

    A cache that ended at its `max_tokens` is extended where more are asked for: it ends with the bytes of one that was
    written at once. Meanwhile it cannot be opened; whoever has it open goes on reading what it was.

    Args:
        directory: new, empty, or a cache that is not complete, of the same settings; a complete one is left as it is.
        source: its hookpoints are all written, from one pass of the model. Its held-out fraction plays no part, as
            the split is made when the cache is read, except where documents are packed: only those of one part of
            the split share an input of the model.
        shard_rows: least rows of a shard; that many rows of every hookpoint are held in memory.
        max_tokens: stop after so many rows; None reads the source to its end.
        dtype: of the activations on disk. bf16 rounds away what the index tells: little, unless their mean is far
            larger than their spread. int8 rounds away more, and the same of any (see `data/stored.py`).
        compression: of the activations on disk: "none" or "zstd".
        on_progress: called with the rows so far after each forward; those of an earlier call count.
    Raises:
        ConfigError: shard_rows or max_tokens is not positive, a hookpoint's name is taken by a folder of ours, or is
            no name for a folder.
        CheckpointError: `directory` exists and is not a cache.
        DataError: the cache in `directory` has other settings, or the source yields nothing.
        StorageError: the file system refused; another call continues the cache.
    """
    directory = expand(directory)
    settings = cache_settings(source, shard_rows, max_tokens, dtype, compression)
    if not directory.is_dir():
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
    with only_one(directory, wait=True):  # another run may be writing the very same cache: then it is there for both
        _write(directory, source, settings, on_progress)


def _write(
    directory: Path,
    source: LanguageModelSource | ImageSource,
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
    n_rows = index.rows
    with ShardWriter(directory, index, shard_rows) as writer:
        # always with a limit, beside which inputs without a token to keep are not counted: a cursor means one thing
        for chunk, cursor in source.chunks(None, index.cursor, _NO_LIMIT if max_tokens is None else max_tokens):
            n_rows += writer.add(chunk, cursor)
            if on_progress is not None:
                on_progress(n_rows)
        writer.finish()


def cache_bytes(widths: Mapping[str, int], rows: int, dtype: CacheDtype) -> int:
    """Return the size of the activations of a cache, before they are compressed.

    Args:
        widths: by hookpoint.
        rows: tokens.
        dtype: as it is asked for.
    """
    layouts = [Layout(width, DTYPE_NAMES[dtype]) for width in widths.values()]
    shards = -(-rows // SHARD_ROWS)
    return sum(rows * layout.row_bytes + shards * layout.shard_bytes for layout in layouts)


def cache_settings(
    source: LanguageModelSource | ImageSource,
    shard_rows: int,
    max_tokens: int | None,
    dtype: CacheDtype,
    compression: Compression = "none",
) -> dict[str, Any]:
    """Return what decides the bytes of a cache, as its index holds it; arguments and errors as `write_cache`."""
    if not hasattr(source, "config"):
        raise ConfigError(
            f"source: expected a model that reads text or a folder of images, got {type(source).__name__}. Other "
            "activations are read beside the training: flashsae.fit(source, ...)."
        )
    for name, value in (("shard_rows", shard_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {dtype!r}.")
    if compression not in get_args(Compression):
        raise ConfigError(f"compression: expected one of {', '.join(get_args(Compression))}, got {compression!r}.")
    if compression == "zstd":
        require("zstandard", "hf")  # now, not when the first shard is full
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
    if isinstance(source, ImageSource):
        settings |= {"reads": IMAGES, "inputs": source.inputs_in_words()}
    if compression != "none":
        settings["cache_compression"] = compression
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
        CacheIndex.begun(settings).write(directory)
    index = CacheIndex.read(directory)
    if index.settings.get("texts"):
        raise DataError(
            f"the activation cache {directory} was merged from others, and nothing is written to it any more. Choose "
            "another folder, and merge again."
        )
    differences = changes(index.settings, settings)
    if extends(index, settings):
        index, differences = _extended(index, settings), []
        index.write(directory)
    if differences and not index.shards:  # nothing was written yet, so nothing is lost
        with storage_errors(directory):
            for kind in (TOKENS_FOLDER, TOKENIZER_FOLDER, *index.settings["hookpoints"]):
                shutil.rmtree(directory / folder_of(kind), ignore_errors=True)
        index, differences = CacheIndex.begun(settings), []
        index.write(directory)
    if differences:
        is_text = any(each.startswith(("dataset", "the text")) for each in differences)
        merging = " Documents that were added to a text are cached by themselves and merged: cache --merge." * is_text
        raise DataError(
            f"the activation cache {directory} was written with other settings: {'; '.join(differences)}. Use the same "
            f"settings, choose another folder, or remove that one.{merging}"
        )
    if index.complete:  # perhaps on a disk that cannot be written to
        return index
    clear_leftovers(directory)
    with storage_errors(directory):
        for kind in (TOKENS_FOLDER, *settings["hookpoints"]):
            (directory / folder_of(kind)).mkdir(exist_ok=True)
    return index


def extends(index: CacheIndex, settings: dict[str, Any]) -> bool:
    """Tell whether settings ask for the same cache with more tokens, and it is one that can be extended."""
    there, wanted = index.settings.get("max_tokens"), settings["max_tokens"]
    if index.marks is None or not isinstance(there, int) or (wanted is not None and wanted <= there):
        return False
    return not changes({**index.settings, "max_tokens": wanted}, settings)


def _extended(index: CacheIndex, settings: dict[str, Any]) -> CacheIndex:
    """Return the index from which more tokens are written, with the shards that stay as they are.

    Where the tokens ended, the last block of documents was cut in reading order, which left out others than its last
    ones in the order of writing. So what was written of it is written anew.
    """
    marks = index.marks or []
    longer = replace(index, settings=settings, marks=None if settings["max_tokens"] is None else marks[:1])
    if index.complete and not may_be_cut(index):  # the text ended before
        return longer
    first = marks[0]
    return replace(longer, shards=index.shards[: first.shards], cursor=first.cursor or None, complete=False)


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

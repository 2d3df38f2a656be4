"""Caches of one model put together: the same hookpoints and settings, other texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from flashsae.data.cache_index import (
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    CacheIndex,
    Shard,
    TextPart,
    check_shard,
    check_tokenizer,
    index_in,
    load_tokens,
    shard_path,
    texts_of,
)
from flashsae.data.cache_writer import changes
from flashsae.data.images import IMAGES
from flashsae.data.stored import StoredRows
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files.atomic import atomic_directory
from flashsae.files.documents import crc32
from flashsae.files.fingerprint import text_digest
from flashsae.lm.hookpoints import folder_of
from flashsae.settings.kinds import expand
from flashsae.text.mixture import names_of_parts

_OF_TEXT = ("dataset", "text_fingerprint", "max_tokens", "max_documents", "document_seed", "shuffle_documents", "texts")
_OF_BATCHES = ("shard_rows", "forward_tokens")
"""Settings that may differ: which documents, in which order, and how many at a time."""
_MOST_DOCUMENTS = 2**62


@dataclass(frozen=True)
class _Part:
    place: Path
    index: CacheIndex


def merge_caches(
    places: Sequence[str | Path], out: str | Path, on_progress: Callable[[int], None] | None = None
) -> int:
    """Put the rows of complete caches one behind another into a new one.

    Documents get numbers of their own, behind those of the parts before, so that the split goes on being one of
    documents; which part a document falls to is decided anew. Activations are hard links where the file system has
    such, and copies elsewhere. A kill leaves nothing; the parts are left as they are.

    Args:
        places: two or more, in their order.
        out: must not exist.
        on_progress: called with the rows so far.
    Returns:
        the number of rows.
    Raises:
        ConfigError: there are fewer than two, or one twice.
        CheckpointError: a part is no cache, not complete or damaged.
        DataError: parts differ in the model or in how it read, or hold the same text.
        StorageError: `out` exists, or the file system refused.
    """
    parts = [_Part(place, index_in(place)) for place in _checked(places)]
    for part in parts:
        if part.index.settings.get("reads") == IMAGES:
            raise DataError(
                f"merge: {part.place} holds activations of images, of which a cache knows one folder; put the images "
                "into one folder, and cache that."
            )
        _check_part(parts[0], part)
    texts, firsts = _numbered_texts(parts)
    settings = _settings(parts, texts)
    shards = list[Shard]()
    with atomic_directory(expand(out)) as aside:
        for kind in (TOKENS_FOLDER, *settings["hookpoints"]):
            (aside / folder_of(kind)).mkdir()
        check_tokenizer(parts[0].place, parts[0].index)
        _copy(parts[0].place / TOKENIZER_FOLDER, aside / TOKENIZER_FOLDER)
        for part, first in zip(parts, firsts):
            for number in range(len(part.index.shards)):
                shards.append(_add(part, number, first, aside, len(shards)))
                if on_progress is not None:
                    on_progress(sum(shard.rows for shard in shards))
            if CacheIndex.read(part.place) != part.index:
                raise CheckpointError(f"the cache {part.place} was changed while it was read; merge again.")
        merged = CacheIndex(settings, shards, None, True, parts[0].index.tokenizer)
        merged.write(aside)
    return merged.rows


def _copy(folder: Path, to: Path) -> None:
    """Copy a folder, which may be on a disk that cannot be written to, without what it forbids."""
    to.mkdir()
    for path in sorted(folder.rglob("*")):
        there = to / path.relative_to(folder)
        there.mkdir() if path.is_dir() else shutil.copyfile(path, there)


def _checked(places: Sequence[str | Path]) -> list[Path]:
    found = [expand(place) for place in places]
    if len(found) < 2:
        raise ConfigError(f"merge: expected two or more caches, got {len(found)}: --merge A B --out C.")
    twice = [place for number, place in enumerate(found) if place.resolve() in map(Path.resolve, found[:number])]
    if twice:
        raise ConfigError(f"merge: expected each cache once, got {twice[0]} twice.")
    return found


def _check_part(first: _Part, part: _Part) -> None:
    """Raise unless a part is complete and was made as the first one was."""
    if not part.index.complete:
        raise CheckpointError(
            f"the activation cache {part.place} is not complete ({part.index.rows} rows so far): finish it by writing "
            "it again with the same settings, then merge."
        )
    there, here = ({n: v for n, v in each.index.settings.items() if n not in _free()} for each in (first, part))
    if "held_out" in here:
        raise DataError(
            f"the cache {part.place} holds packed documents, which share inputs of the model by their numbers, and "
            "merging changes these. Cache the texts as one data set, or without --pack."
        )
    differences = changes(there, here, ", {!r} here")
    if differences:
        raise DataError(
            f"the cache {part.place} cannot be merged with {first.place}: {'; '.join(differences)}. Merge caches of "
            "one model that were written with the same settings."
        )


def _free() -> tuple[str, ...]:
    return (*_OF_TEXT, *_OF_BATCHES)


def _numbered_texts(parts: Sequence[_Part]) -> tuple[list[TextPart], list[int]]:
    """Return the texts of all parts with the numbers that their documents begin at, and where each part begins."""
    texts, firsts, first = list[TextPart](), list[int](), 0
    for part in parts:
        for text in texts_of(part.index):
            same = next((other for other in texts if _shares_documents(other, text)), None)
            if same is not None:
                raise DataError(
                    f"the cache {part.place} holds a text that another one to be merged holds too ({text.dataset}): "
                    "its documents would be there twice, and in both parts of the split. Leave one of them out."
                )
            texts.append(replace(text, first=text.first + first))
        firsts.append(first)
        first += 1 + max(
            int(load_tokens(part.place, part.index, number)["group"].max()) for number in range(len(part.index.shards))
        )
        if first > _MOST_DOCUMENTS:
            raise CheckpointError(f"the numbers of documents in {part.place} are too large to be told apart.")
    return texts, firsts


def _shares_documents(one: TextPart, other: TextPart) -> bool:
    """Tell whether two texts are the same, or one is a mixture that names a part of the other, with what it holds."""
    if one.fingerprint == other.fingerprint != "":
        return True
    names, others = names_of_parts(one.dataset), names_of_parts(other.dataset)
    return len(names) + len(others) > 2 and bool(_known(names) & _known(others))


def _known(names: Sequence[str]) -> set[str]:
    """Return what tells texts apart, wherever they lie, of those whose names say that."""
    return {name[name.rindex("(") :] if "sha256" in name else name for name in names if "sha256" in name or "/" in name}


def _settings(parts: Sequence[_Part], texts: Sequence[TextPart]) -> dict[str, Any]:
    """Return the settings of a merged cache; what differs between its parts is null."""
    settings = dict(parts[0].index.settings)
    for name in _free():
        if any(part.index.settings.get(name) != settings.get(name) for part in parts):
            settings[name] = None
    names = "; ".join(text.dataset for text in texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
    settings |= {"dataset": f"{len(texts)} texts: {names}", "max_tokens": None}
    fingerprint = text_digest([f"{text.first} {text.fingerprint}" for text in texts])
    return settings | {"text_fingerprint": fingerprint, "texts": [asdict(text) for text in texts]}


def _add(part: _Part, number: int, first: int, aside: Path, new: int) -> Shard:
    """Put a shard of a part into the merged cache, its documents numbered from `first` on."""
    shard = part.index.shards[number]
    sums = dict(shard.crc32)
    if first == 0:
        _link(part, TOKENS_FOLDER, number, aside, new)
    else:
        tokens = load_tokens(part.place, part.index, number)
        sums[TOKENS_FOLDER] = _save(shard_path(aside, TOKENS_FOLDER, new), {**tokens, "group": tokens["group"] + first})
    for name in part.index.settings["hookpoints"]:
        StoredRows(shard_path(part.place, name, number), part.index.layout(name), shard.rows)
        _link(part, name, number, aside, new)
    return replace(shard, crc32=sums)


def _save(path: Path, tensors: dict[str, Tensor]) -> int:
    path.write_bytes(safetensors.torch.save(tensors))
    return crc32(path)


def _link(part: _Part, kind: str, number: int, aside: Path, new: int) -> None:
    source, place = shard_path(part.place, kind, number).resolve(), shard_path(aside, kind, new)
    try:
        os.link(source, place)
    except OSError:  # another file system, one without links, or a file of somebody else
        check_shard(part.place, part.index, kind, number)
        shutil.copyfile(source, place)

"""The index of a cache of activations, index.json: what is in it, and how it is verified."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from flashsae.data.mapped import MappedTensors
from flashsae.data.stored import Compression, Layout, StoredDtype
from flashsae.errors import CheckpointError
from flashsae.files.documents import Checksum, crc32, load_document, write_document
from flashsae.files.reading import refusal
from flashsae.files.schema import Count, Finite, Pattern, Range, Size, Text, parse
from flashsae.lm.hookpoints import folder_of

INDEX_FILE = "index.json"
TOKENS_FOLDER, TOKENIZER_FOLDER = "tokens", "tokenizer"
"""The folders of a cache that are not named after a hookpoint."""

FORMAT = "flashsae.activations"
FORMAT_VERSION = 2
_ADVICE = "Write the cache again into another folder."
_RENAMED = {"batch_tokens": "forward_tokens"}
"""What settings were called in version 0.1."""
NotNegative = Annotated[float, Range(0)]
Hookpoint = Annotated[str, Pattern(r"\w[\w.-]*(:in)?", "a hookpoint, whose module path is fit for a file")]
"""A name that becomes a folder: no separator, no drive, nothing that leads out of the cache."""


@dataclass(frozen=True)
class TextPart:
    """A text of a merged cache.

    Args:
        dataset, fingerprint: what it is called, and what it is; "" where nobody knows.
        first: number that its document 0 has here.
    """

    dataset: Text
    fingerprint: Text
    first: Count


@dataclass(frozen=True)
class CacheSettings:
    """What decides the bytes of the shards, as far as readers need it. There are more; all are compared by name.

    Args:
        model, dataset: what they are called.
        model_fingerprint, text_fingerprint: what they are; "" where nobody knows.
        hookpoints: widths by hookpoint.
        dtype, cache_compression: of the shards.
        context_length, mask_special, max_norm_ratio: how the text was read.
        texts: of a merged cache.
    """

    model: Text
    dataset: Text
    model_fingerprint: Text
    text_fingerprint: Text
    hookpoints: dict[Hookpoint, Size]
    dtype: StoredDtype
    context_length: Size
    mask_special: bool
    max_norm_ratio: Finite | None
    cache_compression: Compression = "none"
    texts: list[TextPart] | None = None


@dataclass(frozen=True)
class Rounding:
    """What is rounded away of the activations of a shard: Σ‖x − x̂‖², beside Σ‖x − mean x‖².

    x̂ is x in bfloat16, also where all of x is kept in float32; in a cache in int8 it is what that gives again.
    """

    lost: NotNegative = 0.0
    variance: NotNegative = 0.0


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard.

    Args:
        rows: tokens in it.
        crc32: checksum of each of its files, by hookpoint or `TOKENS_FOLDER`.
        rounding: by hookpoint, where the model gave more than bfloat16, or int8 is stored.
    """

    rows: Size
    crc32: dict[Hookpoint, Checksum]
    rounding: dict[Hookpoint, Rounding] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """A place from which a cache can be extended.

    Args:
        shards: how many lie before it.
        cursor: of the source, behind them; empty at the beginning.
    """

    shards: Count
    cursor: dict[str, Count]

    @property
    def rows(self) -> int:
        """Tokens before it."""
        return self.cursor.get("rows", 0)


@dataclass
class CacheIndex:
    """The content of index.json, the truth about a cache: what it does not name is not there.

    Args:
        settings: what decides the bytes of the shards; at least `CacheSettings`.
        shards: in their order.
        cursor: of the source, behind the last shard; None before the first.
        complete: nothing is left to write.
        tokenizer: checksum of the folder; None before it is written.
        marks: of a cache that ends at its `max_tokens`, ascending: the first one lies before the block of documents
            that was cut there, so no longer cache would have been written otherwise up to it. None in others, and in
            those of version 0.1.
    """

    settings: dict[Text, Any]
    shards: list[Shard] = field(default_factory=list)
    cursor: dict[str, Count] | None = None
    complete: bool = False
    tokenizer: Checksum | None = None
    marks: list[Mark] | None = None

    @staticmethod
    def begun(settings: dict[str, Any]) -> CacheIndex:
        """Return the index of a cache before its first shard."""
        return CacheIndex(settings, marks=None if settings["max_tokens"] is None else [Mark(0, {})])

    def layout(self, hookpoint: str) -> Layout:
        """Return how the activations of a hookpoint are stored."""
        settings = self.settings
        width = int(settings["hookpoints"][hookpoint])
        return Layout(width, settings["dtype"], settings.get("cache_compression", "none"))

    @property
    def rows(self) -> int:
        """Tokens in all shards."""
        return sum(shard.rows for shard in self.shards)

    def rounded_away(self, hookpoint: str) -> float:
        """Return what is rounded away (see `Rounding`), as a fraction of the variance within shards."""
        parts = [shard.rounding.get(hookpoint, Rounding()) for shard in self.shards]
        lost, variance = sum(part.lost for part in parts), sum(part.variance for part in parts)
        return 0.0 if lost == 0.0 else lost / variance if variance else float("inf")

    def write(self, directory: Path) -> None:
        """Write index.json, whole or not at all; raises StorageError where the file system refuses."""
        version = installed_version("flashsae")
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "flashsae_version": version}
        content = head | asdict(self)
        if self.marks is None:
            del content["marks"]
        write_document(directory / INDEX_FILE, content)

    @staticmethod
    def read(directory: Path) -> CacheIndex:
        """Read index.json.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of something else or of another format version.
        """
        path = directory / INDEX_FILE
        index = load_document(path, CacheIndex, head=(FORMAT, FORMAT_VERSION), must_be_sealed=True, advice=_ADVICE)
        index.settings = {_RENAMED.get(name, name): value for name, value in index.settings.items()}
        settings = parse(CacheSettings, index.settings, str(path), _ADVICE)
        names = {TOKENS_FOLDER, *settings.hookpoints}
        if not settings.hookpoints or len(names) <= len(settings.hookpoints) or TOKENIZER_FOLDER in names:
            raise CheckpointError(f"{path} is damaged: its hookpoints are {list(settings.hookpoints)}. {_ADVICE}")
        for number, shard in enumerate(index.shards):
            if shard.crc32.keys() != names:
                raise CheckpointError(f"{path} is damaged: shards[{number}] lacks checksums. {_ADVICE}")
        _check_marks(path, index)
        if index.complete and not index.shards:
            raise CheckpointError(f"{path} is damaged: it is called complete and has no shards. {_ADVICE}")
        return index


def _check_marks(path: Path, index: CacheIndex) -> None:
    """Raise CheckpointError where marks do not ascend to a shard that is there."""
    if index.marks is not None:
        shards = [mark.shards for mark in index.marks]
        if not shards or sorted(set(shards)) != shards or shards[-1] > len(index.shards):
            raise CheckpointError(f"{path} is damaged: its marks are those of other shards. {_ADVICE}")


def texts_of(index: CacheIndex) -> list[TextPart]:
    """Return the texts that a cache holds; several where it was merged."""
    settings = index.settings
    if not settings.get("texts"):
        return [TextPart(settings["dataset"], settings["text_fingerprint"], 0)]
    return [
        TextPart(**{name: text[name] for name in ("dataset", "fingerprint", "first")}) for text in settings["texts"]
    ]


def has_index(directory: Path) -> bool:
    """Tell whether there is an index in a folder, damaged or not."""
    return (directory / INDEX_FILE).exists()


def index_in(directory: Path) -> CacheIndex:
    """Return the index of a cache that somebody names; raises CheckpointError, also where there is none."""
    if not has_index(directory):
        raise CheckpointError(f"{directory} holds no {INDEX_FILE}. Name a folder that flashsae cache wrote.")
    return CacheIndex.read(directory)


def shard_path(directory: Path, kind: str, number: int) -> Path:
    """Return where a shard lies; `kind` is a hookpoint or `TOKENS_FOLDER`."""
    return directory / folder_of(kind) / f"{number:05d}.safetensors"


def load_tokens(directory: Path, index: CacheIndex, number: int) -> dict[str, Tensor]:
    """Return what is known of the tokens of a shard: `token_ids`, `group` and `position`, [n] each.

    Raises:
        CheckpointError: the file is missing, damaged, or holds what cannot be.
    """
    shard = index.shards[number]
    kinds = {"token_ids": torch.int32, "group": torch.int64, "position": torch.int32}
    file = MappedTensors(
        shard_path(directory, TOKENS_FOLDER, number), {name: (dtype, (shard.rows,)) for name, dtype in kinds.items()}
    )
    file.check(shard.crc32[TOKENS_FOLDER], INDEX_FILE)
    if any(int(file.tensors[name].min()) < 0 for name in ("token_ids", "position")):
        raise file.damaged("it has negative token ids or positions")
    return {name: tensor.clone() for name, tensor in file.tensors.items()}


def check_shard(directory: Path, index: CacheIndex, kind: str, number: int) -> None:
    """Raise CheckpointError unless a file of a shard has the checksum in the index."""
    path = shard_path(directory, kind, number)
    _check(path, lambda: crc32(path), index.shards[number].crc32[kind])


def check_tokenizer(directory: Path, index: CacheIndex) -> None:
    """Raise CheckpointError unless the files of the tokenizer have the checksum in the index."""
    folder = directory / TOKENIZER_FOLDER
    _check(folder, lambda: folder_crc32(folder), index.tokenizer)


def _check(path: Path, checksum: Callable[[], int], expected: int | None) -> None:
    try:
        found = checksum()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {refusal(path, error)} {_ADVICE}") from error
    if found != expected:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one in {INDEX_FILE}. {_ADVICE}")


def folder_crc32(folder: Path) -> int:
    """Return a CRC-32 of the names and contents of all files in a folder."""
    total = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total = zlib.crc32(f"{path.relative_to(folder).as_posix()} {crc32(path)} ".encode(), total)
    return total


def verify_cache(directory: Path) -> tuple[int, int]:
    """Read every byte of a cache and compare it with its checksums; complete or not.

    Returns:
        the number of files verified and their size in bytes.
    Raises:
        CheckpointError: names every file that is damaged or missing.
    """
    index = index_in(directory)
    wrong, files, size = [], 1, (directory / INDEX_FILE).stat().st_size
    if index.tokenizer is not None:
        try:
            check_tokenizer(directory, index)
        except CheckpointError:
            wrong.append(str(directory / TOKENIZER_FOLDER))
    for number, shard in enumerate(index.shards):
        for kind in shard.crc32:
            path = shard_path(directory, kind, number)
            try:
                check_shard(directory, index, kind, number)
                files, size = files + 1, size + path.stat().st_size
            except CheckpointError:
                wrong.append(str(path))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"damaged or missing: {', '.join(wrong[:5])}{more}. {_ADVICE}")
    return files, size

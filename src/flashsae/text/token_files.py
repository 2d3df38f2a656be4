"""Token ids in files of numbers: .npy, and .bin as several trainers of language models write them.

Files are mapped, not read; a document is a slice of the map. Nothing in them is executed: pickles are never loaded.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from flashsae.errors import ConfigError, DataError, FlashSAEError, first_line
from flashsae.text.content import Content, Tokens
from flashsae.text.streams import unreadable

TOKEN_KINDS = (".bin", ".npy")
DTYPES = ("uint16", "uint32", "int32", "int64")
"""Of token ids in a file that does not tell it."""
_PIECE, _PIECES = 8192, 64
"""Tokens of a document where nothing separates documents, and how many such there should be at least."""
_HEADERS: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""The first number of files of llm.c, whose header of 256 int32 says how many tokens of which dtype follow."""
_HEADER_BYTES = 1024
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_DTYPES = {
    code: np.dtype(name) for code, name in ((1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
"""Of the tokens, by the number that an .idx of Megatron has for them."""
_SCAN = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """The documents of a file of token ids, each read when it is asked for.

    Args:
        file: where they are, for messages.
        ids: [n], an integer dtype, mapped.
        starts: [documents], int64, where each begins.
        ends: [documents], int64, behind the last of each.
    """

    file: Path
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def is_uncut(self) -> bool:
        """Whether all tokens are one document."""
        return len(self) == 1 and int(self.ends[0] - self.starts[0]) == len(self.ids)

    def __getitem__(self, place: int) -> Tokens:
        try:
            return Tokens(self.ids[int(self.starts[place]) : int(self.ends[place])])
        except DataError as error:
            raise DataError(f"{self.file}, document {place}: {error}") from None


@dataclass(frozen=True)
class TokenFiles:
    """The documents of several files of token ids, one file behind the other."""

    files: tuple[TokenFile, ...]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int, /) -> Tokens:
        which = bisect.bisect_right(self._ends, place)
        return self.files[which][place - (self._ends[which - 1] if which else 0)]

    def read(self, start: int) -> Iterator[Content]:
        """Yield the documents from a number on."""
        return (self[place] for place in range(start, len(self)))


def open_tokens(file: Path, dtype: str | None, separator: int | None) -> TokenFile:
    """Map a file of token ids.

    Documents are what stands between `separator`; the rows of a matrix; what the .idx of Megatron says; or else pieces
    of 8192 tokens, less where there would be fewer than 64.

    Args:
        file: .npy, or .bin.
        dtype: of a .bin that does not tell its own, one of DTYPES.
        separator: an id that is not part of any document; None if there is no such.
    Raises:
        ConfigError: the dtype is not known, or said to be another than it is.
        DataError: the file is damaged, or holds no flat array or matrix of token ids.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"text_dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    try:
        if file.suffix.lower() == ".npy":
            ids: np.ndarray = np.lib.format.open_memmap(file, mode="r")
            _check_dtype(file, dtype, ids.dtype)
        elif file.with_suffix(".idx").is_file():
            return _megatron(file, dtype, separator)
        else:
            ids = _flat(file, dtype)
    except FlashSAEError:
        raise
    except OSError as error:
        raise unreadable(file, error) from error
    except Exception as error:  # numpy's of headers are of many kinds, also those of Python's tokenizer
        raise DataError(f"{file} is no array of token ids: {first_line(error)}") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise DataError(
            f"{file}: expected token ids, whole numbers in a flat array or a matrix, got {ids.dtype} of shape "
            f"{list(ids.shape)}."
        )
    if ids.ndim == 2 and separator is None:
        starts = np.arange(ids.shape[0], dtype=np.int64) * ids.shape[1]
        return TokenFile(file, ids.reshape(-1), starts, starts + ids.shape[1])
    return _cut(file, ids.reshape(-1), separator)


def _check_dtype(file: Path, asked: str | None, there: np.dtype) -> None:
    if asked is not None and np.dtype(asked) != there:
        raise ConfigError(f"text_dtype: {file} says that it holds {there}, got {asked!r}. Leave the setting out.")


def _flat(file: Path, dtype: str | None) -> np.ndarray:
    with open(file, "rb") as stream:
        head = np.frombuffer(stream.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0"), dtype="<i4")
    size = file.stat().st_size
    if size >= _HEADER_BYTES and int(head[0]) in _HEADERS:
        known, count = _HEADERS[int(head[0])], int(head[2])
        _check_dtype(file, dtype, known)
        if not 0 <= count <= (size - _HEADER_BYTES) // known.itemsize:
            raise DataError(f"{file} is cut short: its header says that {count:,} tokens follow. Get it anew.")
        return _map(file, known, _HEADER_BYTES, count)
    if dtype is None:
        raise ConfigError(
            f"text_dtype: {file} does not say how its tokens are stored; give --text-dtype uint16, as nanoGPT writes "
            "them, or uint32."
        )
    if size % np.dtype(dtype).itemsize:
        raise DataError(
            f"{file} holds {size:,} bytes, which are no whole number of {dtype}: give the right text_dtype."
        )
    return _map(file, np.dtype(dtype).newbyteorder("<"), 0, size // np.dtype(dtype).itemsize)


def _map(file: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    if not count:  # of which there is no map
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r", offset=offset, shape=(count,))


def _cut(file: Path, ids: np.ndarray, separator: int | None) -> TokenFile:
    if separator is None:
        size = max(1, min(_PIECE, len(ids) // _PIECES))
        starts = np.arange(0, len(ids), size, dtype=np.int64)
        return TokenFile(file, ids, starts, np.minimum(starts + size, len(ids)))
    found = [np.flatnonzero(ids[i : i + _SCAN] == separator) + i for i in range(0, len(ids), _SCAN)]
    places = np.concatenate([np.array([-1]), *found, np.array([len(ids)])]).astype(np.int64)
    starts, ends = places[:-1] + 1, places[1:]
    is_there = ends > starts
    return TokenFile(file, ids, starts[is_there], ends[is_there])


def _megatron(file: Path, dtype: str | None, separator: int | None) -> TokenFile:
    """Map a .bin whose documents an .idx beside it lists."""
    index = file.with_suffix(".idx")
    with open(index, "rb") as stream:
        head = stream.read(len(_INDEX_MAGIC) + 25)
    magic, rest = head[: len(_INDEX_MAGIC)], head[len(_INDEX_MAGIC) :]
    if magic != _INDEX_MAGIC or len(rest) != 25 or rest[8] not in _INDEX_DTYPES:
        raise DataError(f"{index} is no index of Megatron for a file of token ids; take it out, or get it anew.")
    known = _INDEX_DTYPES[rest[8]]
    _check_dtype(file, dtype, known)
    n_sequences, n_bounds = (int(np.frombuffer(rest[at : at + 8], "<u8")[0]) for at in (9, 17))
    begins = len(head)
    if n_sequences * 12 + n_bounds * 8 > index.stat().st_size - begins or n_bounds > n_sequences + 1:
        raise DataError(f"{index} is cut short: it should list {n_sequences:,} sequences. Get it anew.")
    lengths = _map(index, np.dtype("<i4"), begins, n_sequences)
    places = _map(index, np.dtype("<i8"), begins + 4 * n_sequences, n_sequences)
    bounds = np.asarray(_map(index, np.dtype("<i8"), begins + 12 * n_sequences, n_bounds))
    ids = _map(file, known, 0, file.stat().st_size // known.itemsize)
    first, behind = places // known.itemsize, places // known.itemsize + lengths
    is_right = (lengths >= 0).all() and (places >= 0).all() and (behind <= len(ids)).all()
    is_right = is_right and (np.diff(bounds) >= 0).all() and (bounds >= 0).all() and (bounds <= n_sequences).all()
    is_right = is_right and (first[1:] == behind[:-1]).all()
    if not is_right or (n_bounds and (bounds[0] != 0 or bounds[-1] != n_sequences)):
        raise DataError(f"{index} does not fit {file}: its sequences lie elsewhere. Get both anew.")
    edges = np.append(first, behind[-1:]).astype(np.int64)
    if separator is not None:
        return _cut(file, ids[: edges[-1]] if len(edges) else ids, separator)
    if n_bounds < 2:
        return TokenFile(file, ids, np.asarray(first, np.int64), np.asarray(behind, np.int64))
    starts, ends = edges[bounds[:-1]], edges[bounds[1:]]
    return TokenFile(file, ids, starts, ends)

"""Where activations come from: the two interfaces every source has, the held-out split, and plain arrays.

A source yields `Chunk`s in its own order and knows nothing of shuffling or batches (`data/shuffle.py`).
A `StreamSource` can only be read forwards and resumed at a cursor; a `RowSource` can also be read at any row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flashsae.data.acts import as_acts, batch_acts, iterate
from flashsae.data.fingerprint import rows_digest, tensors_digest
from flashsae.errors import DataError, DtypeError, ShapeError
from flashsae.settings.reading import check_held_out as check_held_out

Split = Literal["train", "held_out"]
Cursor: TypeAlias = dict[str, int]
"""A place in a stream, as JSON: opaque to everyone but the source that made it."""

_ARRAY_CHUNK_ROWS = 8192
_HASHED_BYTES = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of activations with what is known of each.

    Args:
        acts: [n, d_in], any float dtype.
        group: [n], int64. The unit of the held-out split: the document of a token, the number of a plain row.
        token_ids: [n], int32, or None where there is no text.
        position: [n], int32, place of the token in its model input, or None where there is no text. Neighbours
            in a text are neighbouring rows of one group whose positions ascend.
    """

    acts: Tensor
    group: Tensor
    token_ids: Tensor | None = None
    position: Tensor | None = None

    def select(self, keep: Tensor) -> Chunk:
        """Return the rows that `keep` ([n], bool, or indices, on any device) picks."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[keep.to(tensor.device)]  # a model on a GPU leaves what is known of its tokens on the CPU

        return Chunk(
            pick(self.acts),
            pick(self.group),
            None if self.token_ids is None else pick(self.token_ids),
            None if self.position is None else pick(self.position),
        )


class StreamSource(Protocol):
    """Activations that come in one order, such as a language model reading text."""

    name: str
    """For messages: what the reader would call it."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in source order, each chunk with the cursor of the place behind it.

        Args:
            split: "train" or "held_out".
            cursor: start there; None is the beginning.
        """


@runtime_checkable
class RowSource(Protocol):
    """Activations that lie in memory or on disk and can be read at any row. Also a `StreamSource`."""

    name: str

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """As `StreamSource.chunks`."""

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""

    def rows(self, index: Tensor) -> Tensor:
        """Return rows by number: index [n], int64, in any order -> [n, d_in]."""


Source: TypeAlias = StreamSource | RowSource


def identity_of(source: Source) -> dict[str, Any]:
    """Return what a source says of itself that a checkpoint must find again, by name, as JSON; {} if it says nothing.

    A source may have an attribute `identity`: fingerprints of what it reads, and the settings that it is read with.
    """
    return dict(getattr(source, "identity", {}))


def split_mask(group: Tensor, held_out: float, split: Split) -> Tensor:
    """Tell which rows belong to a split. A group is in one split for ever, whatever the order or the seed.

    Args:
        group: [n], int64.
        held_out: fraction of the groups that training never sees.
        split: "train" or "held_out".
    Returns:
        [n], bool.
    Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014) turns a group number into a uniform one.
    """
    h = group.to(torch.int64) + 0x1E3779B97F4A7C15
    h = (h ^ _shift(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ _shift(h, 27)) * -0x6B2FB644ECCEEE15
    uniform = _shift(h ^ _shift(h, 31), 11).to(torch.float64) / 2**53
    is_held_out = uniform < held_out
    return is_held_out if split == "held_out" else ~is_held_out


def _shift(h: Tensor, bits: int) -> Tensor:
    """Shift right without copies of the sign bit, which torch lacks for int64."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


class ArraySource:
    """Activations in one tensor, numpy array or memory-mapped array; each row is its own group.

    Args:
        x: [tokens, d_in], float. Not copied; a memory-mapped array is read a few rows at a time.
        held_out: fraction of the rows that training never sees.
    Raises:
        ShapeError, DtypeError, DataError: x is not [tokens, d_in], not float, or empty.
    """

    def __init__(self, x: Tensor | np.ndarray, *, held_out: float = 0.0, name: str = "x") -> None:
        self.name = name
        self._x = as_acts(x, name)
        self._held_out = check_held_out(held_out)
        if len(self._x) == 0:
            raise DataError(f"{name} is empty: expected at least one row of activations.")

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self._x.shape[1])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must find again: all rows of up to 64 MiB, a sample of more, and how they are split."""
        is_small = self._x.numel() * self._x.element_size() <= _HASHED_BYTES
        rows = tensors_digest([("x", self._x)]) if is_small else rows_digest(self._x)
        return {"kind": "array", "rows": rows, "held_out": self._held_out}

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""
        return split_mask(torch.arange(len(self._x), dtype=torch.int64, device="cpu"), self._held_out, split).nonzero()[
            :, 0
        ]

    def rows(self, index: Tensor) -> Tensor:
        """Return rows by number: index [n], int64 -> [n, d_in], a copy."""
        return self._x.index_select(0, index.to(self._x.device))

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in order."""
        first = (cursor or {}).get("row", 0)
        for start in range(first, len(self._x), _ARRAY_CHUNK_ROWS):
            stop = min(start + _ARRAY_CHUNK_ROWS, len(self._x))
            group = torch.arange(start, stop, dtype=torch.int64, device="cpu")
            chunk = Chunk(self._x[start:stop], group).select(split_mask(group, self._held_out, split))
            yield chunk, {"row": stop}


class IterableSource:
    """Activations from any iterable of [tokens, d_in] batches: a generator, a DataLoader, a list of tensors.

    Args:
        batches: read once if it is an iterator, once an epoch otherwise.
    Raises:
        ShapeError, DtypeError: a batch is not [tokens, d_in] or not float, or width, dtype or device change.
    """

    def __init__(self, batches: Iterable[Tensor | np.ndarray], *, name: str = "the iterable x") -> None:
        self.name = name
        self._batches = batches
        self._ahead: Tensor | None = None
        self._iterator: Iterator[Tensor | np.ndarray] | None = None
        self._d_in = self._first_width()

    def _first_width(self) -> int:
        """Read the first batch for its width and keep it, so that a generator loses nothing."""
        self._iterator = iterate(self._batches)
        self._ahead = next((self._tensor(batch) for batch in self._iterator), None)
        if self._ahead is None:
            raise DataError(f"{self.name} is empty: expected at least one [tokens, d_in] batch.")
        self.identity = {"kind": "iterable", "first batch": rows_digest(self._ahead)}
        self._kind = self._ahead.dtype, self._ahead.device
        return int(self._ahead.shape[1])

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._d_in

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self._d_in * self._kind[0].itemsize

    def _tensor(self, batch: Any) -> Tensor:
        return batch_acts(batch, f"a batch of {self.name}")

    def _epoch(self) -> Iterator[Tensor]:
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            if isinstance(self._batches, Iterator):
                return  # read once, and it has been
            iterator = iter(self._batches)
        if self._ahead is not None:
            yield self._ahead
            self._ahead = None
        for batch in iterator:
            yield self._tensor(batch)

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch. There is no held-out split: evaluate on other data instead."""
        if split == "held_out":
            return
        skip = (cursor or {}).get("batch", 0)
        row = 0
        for number, acts in enumerate(self._epoch()):
            if acts.shape[1] != self._d_in:
                raise ShapeError(
                    f"batch {number} of {self.name}: expected [tokens, {self._d_in}], got {list(acts.shape)}."
                )
            if (acts.dtype, acts.device) != self._kind:
                expected, device = self._kind
                raise DtypeError(
                    f"batch {number} of {self.name}: expected {expected} on {device}, as the first batch, got "
                    f"{acts.dtype} on {acts.device}. Convert all of them: (batch.float() for batch in x)."
                )
            group = torch.arange(row, row + len(acts), dtype=torch.int64, device="cpu")
            row += len(acts)
            if number >= skip:
                yield Chunk(acts, group), {"batch": number + 1}

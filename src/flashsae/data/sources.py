"""Where activations come from: the two interfaces every source has, the held-out split, and plain arrays.

A source yields `Chunk`s in its own order and knows nothing of shuffling or batches (`data/shuffle.py`).
A `StreamSource` can only be read forwards and resumed at a cursor; a `RowSource` can also be read at any row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flashsae.architecture.sites import shown_by_site
from flashsae.data.acts import Batch, X, acts_by_site, as_acts, batch_acts, iterate, only_site
from flashsae.data.split import Split, split_mask
from flashsae.errors import DataError, DtypeError, ShapeError
from flashsae.files.fingerprint import rows_digest, tensors_digest
from flashsae.settings.reading import check_held_out

Cursor: TypeAlias = dict[str, int]
"""A place in a stream, as JSON: opaque to everyone but the source that made it."""

_ARRAY_CHUNK_ROWS = 8192
_HASHED_BYTES = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of activations with what is known of each.

    Args:
        acts: by site, [n, d], any float dtype; several sites are of the same tokens.
        group: [n], int64. The unit of the held-out split: the document of a token, the number of a plain row.
        token_ids: [n], int32, or None where there is no text.
        position: [n], int32, place of the token in its model input, or None where there is no text. Neighbours
            in a text are neighbouring rows of one group whose positions ascend.
    """

    acts: Batch
    group: Tensor
    token_ids: Tensor | None = None
    position: Tensor | None = None

    def select(self, keep: Tensor) -> Chunk:
        """Return the rows that `keep` ([n], bool, or indices, on any device) picks."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[keep.to(tensor.device)]  # a model on a GPU leaves what is known of its tokens on the CPU

        return Chunk(
            {site: pick(acts) for site, acts in self.acts.items()},
            pick(self.group),
            None if self.token_ids is None else pick(self.token_ids),
            None if self.position is None else pick(self.position),
        )


class StreamSource(Protocol):
    """Activations that come in one order, such as a language model reading text.

    One whose `gives_finite` is True has made sure that all it yields is finite; that of others is looked at.
    """

    name: str
    """For messages: what the reader would call it."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by site."""

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
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by site."""

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """As `StreamSource.chunks`."""

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""

    def rows(self, index: Tensor) -> Batch:
        """Return rows by number: index [n], int64, in any order -> [n, d] by site."""


Source: TypeAlias = StreamSource | RowSource


def identity_of(source: Source) -> dict[str, Any]:
    """Return what a source says of itself that a checkpoint must find again, by name, as JSON; {} if it says nothing.

    A source may have an attribute `identity`: fingerprints of what it reads, and the settings that it is read with.
    """
    return dict(getattr(source, "identity", {}))


def announce(source: RowSource, index: Tensor, reader: object) -> None:
    """Tell a source which rows a reader will ask for next, if it wants to know: it may have a method `expect`."""
    expect = getattr(source, "expect", None)
    if expect is not None:
        expect(index, reader)


class ArraySource:
    """Activations in one tensor, numpy array or memory-mapped array, or in one a site; each row is its own group.

    Args:
        x: [tokens, d_in], float, at the site "x"; or such by site, of the same tokens. Not copied; a memory-mapped
            array is read a few rows at a time.
        held_out: fraction of the rows that training never sees.
    Raises:
        ShapeError, DtypeError, DataError: x is not [tokens, d_in], not float, or empty; or its sites do not belong
            together.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray],
        *,
        held_out: float = 0.0,
        name: str = "x",
    ) -> None:
        self.name = name
        self._acts = acts_by_site(x, name) if isinstance(x, Mapping) else {X: as_acts(x, name)}
        self._held_out = check_held_out(held_out)
        self.n_rows = len(next(iter(self._acts.values()), ()))
        if self.n_rows == 0:
            raise DataError(f"{name} is empty: expected at least one row of activations.")
        self.widths = {site: int(acts.shape[1]) for site, acts in self._acts.items()}

    @property
    def d_in(self) -> int:
        """Width of the activations of the only site."""
        return only_site(self.widths)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must find again: all rows of up to 64 MiB, a sample of more, and how they are split."""
        is_small = sum(acts.numel() * acts.element_size() for acts in self._acts.values()) <= _HASHED_BYTES
        rows = tensors_digest(self._acts.items()) if is_small else " ".join(map(rows_digest, self._acts.values()))
        return {"kind": "array", "sites": list(self.widths), "rows": rows, "held_out": self._held_out}

    def split_rows(self, split: Split) -> Tensor:
        """Return the row numbers of a split: [n], int64, ascending."""
        return split_mask(torch.arange(self.n_rows, dtype=torch.int64, device="cpu"), self._held_out, split).nonzero()[
            :, 0
        ]

    def rows(self, index: Tensor) -> Batch:
        """Return rows by number: index [n], int64 -> [n, d] by site, copies."""
        return {site: acts.index_select(0, index.to(acts.device)) for site, acts in self._acts.items()}

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split in order."""
        first = (cursor or {}).get("row", 0)
        for start in range(first, self.n_rows, _ARRAY_CHUNK_ROWS):
            stop = min(start + _ARRAY_CHUNK_ROWS, self.n_rows)
            group = torch.arange(start, stop, dtype=torch.int64, device="cpu")
            acts = {site: acts[start:stop] for site, acts in self._acts.items()}
            chunk = Chunk(acts, group).select(split_mask(group, self._held_out, split))
            yield chunk, {"row": stop}


class IterableSource:
    """Activations from any iterable of batches: a generator, a DataLoader, a list of tensors.

    Args:
        batches: read once if it is an iterator, once an epoch otherwise.
        sites: what to take of each batch. Of one site, a batch is [tokens, d_in], or a tuple, list or dict of nothing
            else; of several it is a dict that holds them, whatever it holds beside, or as many of other names. None:
            all that the first batch holds.
    Raises:
        ShapeError, DtypeError: a batch is not [tokens, d_in] or not float, or width, dtype or device change.
    """

    def __init__(
        self,
        batches: Iterable[Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray]],
        *,
        sites: Sequence[str] = (X,),
        name: str = "the iterable x",
    ) -> None:
        self.name = name
        self._batches = batches
        self._sites = tuple(sites)
        self._iterator: Iterator[Any] | None = iterate(batches)
        # the first batch tells the widths, and is kept, so that a generator loses nothing
        raw = next(self._iterator, None)
        if raw is None:
            raise DataError(f"{name} is empty: expected at least one [tokens, d_in] batch.")
        if not self._sites and isinstance(raw, Mapping):
            self._sites = tuple(raw)
        if len(self._sites) > 1 and isinstance(raw, Mapping) and len(raw) == len(self._sites):
            self._sites = self._sites if set(raw) == set(self._sites) else tuple(raw)  # of other names, the order tells
        first = self._acts(raw)
        self._ahead: Batch | None = first
        digests = " ".join(map(rows_digest, first.values()))
        self.identity = {"kind": "iterable", "sites": list(first), "first batch": digests}
        self.widths = {site: int(acts.shape[1]) for site, acts in first.items()}
        self._kinds = {site: (acts.dtype, acts.device) for site, acts in first.items()}

    @property
    def d_in(self) -> int:
        """Width of the activations of the only site."""
        return only_site(self.widths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return sum(width * self._kinds[site][0].itemsize for site, width in self.widths.items())

    def _acts(self, batch: Any) -> Batch:
        what = f"a batch of {self.name}"
        if len(self._sites) == 1:
            return {self._sites[0]: batch_acts(batch, what)}
        if not isinstance(batch, Mapping) or not self._sites or any(site not in batch for site in self._sites):
            got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            wanted = ", ".join(self._sites) or "activations by site"
            raise DtypeError(
                f"{what}: expected a dict of {wanted}, got {got}. Name its entries: {shown_by_site(self._sites)}."
            )
        return acts_by_site({site: batch[site] for site in self._sites}, what)

    def _epoch(self) -> Iterator[Batch]:
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            if isinstance(self._batches, Iterator):
                return  # read once, and it has been
            iterator = iter(self._batches)
        if self._ahead is not None:
            yield self._ahead
            self._ahead = None
        for batch in iterator:
            yield self._acts(batch)

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch. There is no held-out split: evaluate on other data instead."""
        if split == "held_out":
            return
        skip = (cursor or {}).get("batch", 0)
        row = 0
        for number, acts in enumerate(self._epoch()):
            for site, each in acts.items():
                self._check(each, site, f"batch {number} of {self.name}")
            rows = len(next(iter(acts.values())))
            group = torch.arange(row, row + rows, dtype=torch.int64, device="cpu")
            row += rows
            if number >= skip:
                yield Chunk(acts, group), {"batch": number + 1}

    def _check(self, acts: Tensor, site: str, what: str) -> None:
        """Raise if a batch differs from the first one in more than its tokens."""
        what = what if len(self._sites) == 1 else f"{what} at {site}"
        if acts.shape[1] != self.widths[site]:
            raise ShapeError(f"{what}: expected [tokens, {self.widths[site]}], got {list(acts.shape)}.")
        if (acts.dtype, acts.device) != self._kinds[site]:
            expected, device = self._kinds[site]
            raise DtypeError(
                f"{what}: expected {expected} on {device}, as the first batch, got {acts.dtype} on {acts.device}. "
                "Convert all of them: (batch.float() for batch in x)."
            )

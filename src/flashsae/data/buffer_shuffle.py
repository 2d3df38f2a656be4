"""Shuffled batches of a stream, which is read in its order through a buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsae.backend import moved
from flashsae.data.acts import Batch, check_finite
from flashsae.data.batches import ADVICE, PLACE, OnFill, State, check_identity, generator_of
from flashsae.data.sources import Chunk, Cursor, StreamSource, identity_of
from flashsae.errors import CheckpointError, ConfigError, DataEndedError, DataError
from flashsae.files.schema import Count, parse


def buffer_size(buffer_tokens: int, batch_tokens: int, tokens: int | None) -> int:
    """Return how many rows a shuffle buffer holds: no more than are trained on, but at least two batches.

    Args:
        buffer_tokens: the most that it may hold.
        batch_tokens: rows in a batch.
        tokens: to train on, which makes whole batches; None if that is not known.
    """
    if tokens is None:
        return buffer_tokens
    return min(buffer_tokens, max(_whole_batches(tokens, batch_tokens), 2 * batch_tokens))


def _whole_batches(tokens: int, batch_tokens: int) -> int:
    """Return the rows of as many whole batches as `tokens` need."""
    return -(-tokens // batch_tokens) * batch_tokens


_BUFFER, _REST = "buffer.", "rest."
"""What the tensors of a state are called, before the name of their site."""


@dataclass(frozen=True)
class _BufferPlace:
    epoch: Count
    cursor: dict[str, Count] | None
    arrived: Count
    device: str | None
    is_over: bool = False
    holds_all: bool = False
    source: dict[str, Any] = field(default_factory=dict)


class BufferShuffle:
    """Rows of a stream, mixed in a buffer: all that is in it is permuted again whenever half of it was given out.

    What a batch leaves free is filled before the next one, so a language model that is read has as much to do for every
    batch, and can do it while the device trains on the last one. A buffer that holds all that will be trained on is
    filled once.

    Args:
        source: read forwards; from the start again when an epoch ends.
        batch_tokens: rows in a batch.
        seed: of the order.
        buffer_tokens: rows in the buffer, at least twice a batch. Memory: this many rows and one chunk.
        tokens: rows that will be given out, if that is known: the buffer is no larger than they need (`buffer_size`).
    """

    def __init__(
        self,
        source: StreamSource,
        batch_tokens: int,
        *,
        seed: int,
        buffer_tokens: int,
        tokens: int | None = None,
    ) -> None:
        if buffer_tokens < 2 * batch_tokens:
            raise ConfigError(
                f"shuffle_tokens: expected at least two batches ({2 * batch_tokens} tokens), got {buffer_tokens}."
            )
        self._source = source
        self._identity = identity_of(source)  # now: it may take a while, or fail
        self._is_finite = getattr(source, "gives_finite", False)
        self._batch_tokens = batch_tokens
        self._generator = generator_of(seed)
        self._epoch = 0
        self._is_over = False  # what can be read only once has been read; not so behind a restored state
        self.epoch_tokens: int | None = None
        self._counted: int | None = 0  # rows read of this epoch; None if it was resumed in its middle
        self._whole: int | None = None  # rows of the epoch before
        self._cursor: Cursor | None = None
        self._chunks: Iterator[tuple[Chunk, Cursor]] | None = None
        self._rest: Batch | None = None  # of the last chunk, what the buffer had no room for
        self._buffer: Batch | None = None  # [buffer_tokens, d] by site; made when the first chunk shows dtypes
        # every place in the buffer is in one of three: to be given out in this order; filled since; free
        self._order, self._arrived = (
            torch.zeros(0, dtype=torch.int64, device="cpu"),
            torch.zeros(0, dtype=torch.int64, device="cpu"),
        )
        self._most = buffer_tokens
        self._capacity = buffer_size(buffer_tokens, batch_tokens, tokens)
        self._holds_all = tokens is not None and _whole_batches(tokens, batch_tokens) <= self._capacity
        self._free = torch.arange(self._capacity, dtype=torch.int64, device="cpu")

    def next_batch(self) -> Batch:
        """Return the next batch. Raises DataEndedError when a source that can be read only once has ended."""
        self._fill()
        if self._buffer is None or len(self._order) < self._batch_tokens:
            raise DataEndedError(
                f"{self._source.name} ended: {len(self._order)} rows are left, fewer than a batch of "
                f"{self._batch_tokens}."
            )
        places, self._order = self._order[: self._batch_tokens], self._order[self._batch_tokens :]
        self._free = torch.cat([self._free, places])
        return self._rows_at(places)

    def sample(self, tokens: int, on_fill: OnFill | None = None) -> Batch:
        """Return up to `tokens` rows of the buffer; `on_fill` hears of each chunk if it has to be filled first."""
        if self._buffer is None:
            self._fill(on_fill)
        if self._buffer is None:
            raise DataError(f"{self._source.name} is empty: expected at least one row of activations.")
        return self._rows_at(self._order[:tokens])

    def _rows_at(self, places: Tensor) -> Batch:
        assert self._buffer is not None
        places = moved(places, _device(self._buffer))
        return {site: rows.index_select(0, places) for site, rows in self._buffer.items()}

    def _fill(self, on_fill: OnFill | None = None) -> None:
        """Read rows into all free places; permute all if less than half, or than a batch, is left of the order."""
        if self._holds_all and len(self._order) >= self._batch_tokens:
            return
        while len(self._free):
            rows = self._next_rows()
            if rows is None:
                break
            if self._buffer is None:
                self._buffer = _buffer_for(rows, self._capacity)
            n_rows = _rows_in(rows)
            places, self._free = self._free[:n_rows], self._free[n_rows:]
            there = moved(places, _device(self._buffer))
            for site, buffer in self._buffer.items():
                buffer[there] = rows[site][: len(places)]
            self._arrived = torch.cat([self._arrived, places])
            is_over = n_rows > len(places)
            self._rest = {site: each[len(places) :].clone() for site, each in rows.items()} if is_over else None
            if on_fill is not None:
                on_fill(self._capacity - len(self._free), self._capacity)
        if len(self._order) < max(self._batch_tokens, self._capacity // 2):
            there = torch.cat([self._order, self._arrived])
            self._order, self._arrived = (
                there[torch.randperm(len(there), generator=self._generator, dtype=torch.int64, device="cpu")],
                there[:0],
            )

    def _next_rows(self) -> Batch | None:
        """Return more rows of the stream, beginning a new epoch where one ends; None if there are none for ever."""
        if self._rest is not None:
            return self._rest
        if self._is_over:
            return None
        for _ in range(2):  # the rest of this epoch, or the next one; an epoch without rows is the end
            if self._chunks is None:
                self._chunks = self._source.chunks("train", self._cursor)
            for chunk, cursor in self._chunks:
                self._cursor = cursor
                if len(chunk.group):
                    self._count(len(chunk.group))
                    for site, acts in () if self._is_finite else chunk.acts.items():
                        where = "" if len(chunk.acts) == 1 else f" at {site}"
                        check_finite(acts, f"{self._source.name}{where}, groups {_span(chunk.group)}")
                    return chunk.acts
            self._chunks, self._cursor = None, None
            self._whole, self._counted = self._counted, 0
            self._epoch += 1
        self._is_over = True
        return None

    def _count(self, rows: int) -> None:
        """Count the rows of an epoch; the size of the last one is known once another one begins."""
        if self._counted is not None:
            self.epoch_tokens = self.epoch_tokens or self._whole
            self._counted += rows

    def state(self) -> State:
        """Return the cursor and the contents of the buffer: first those to be given out, in their order."""
        device = None if self._buffer is None else str(_device(self._buffer))
        place = {
            "epoch": self._epoch,
            "is_over": self._is_over,
            "holds_all": self._holds_all,
            "cursor": self._cursor,
            "arrived": len(self._arrived),
            "device": device,
            "source": self._identity,
        }
        tensors = {"generator": self._generator.get_state()}
        if self._buffer is not None:
            rows = self._rows_at(torch.cat([self._order, self._arrived]))
            tensors |= {f"{_BUFFER}{site}": each.cpu() for site, each in rows.items()}
        if self._rest is not None:
            tensors |= {f"{_REST}{site}": each.cpu() for site, each in self._rest.items()}
        return place, tensors

    def restore(self, state: State) -> None:
        """Resume where the state was taken; raises CheckpointError if the source is another now."""
        check_identity(self._source.name, self._identity, state[0])
        place, tensors = parse(_BufferPlace, state[0], PLACE, ADVICE), state[1]
        self._epoch, self._cursor, self._chunks = place.epoch, place.cursor, None
        self._is_over = place.is_over
        if self._holds_all and not place.holds_all:  # of a version whose buffers were as large as they might be
            self._holds_all, self._capacity = False, self._most
        self._counted = None
        try:
            self._restore_tensors(place, tensors)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{PLACE} is damaged: its buffer is not as it was written. {ADVICE}") from error

    def _restore_tensors(self, place: _BufferPlace, tensors: dict[str, Tensor]) -> None:
        self._generator.set_state(tensors["generator"])
        rows, rest = (self._saved(tensors, part, place.device) for part in (_BUFFER, _REST))
        if rows is not None:
            n_rows = _rows_in(rows)
            if place.arrived > n_rows:
                raise ValueError("more rows have arrived than there are")
            self._buffer = _buffer_for(rows, self._capacity)
            for site, buffer in self._buffer.items():
                buffer[:n_rows] = rows[site]
            ends = n_rows - place.arrived, n_rows
            self._order, self._arrived, self._free = torch.arange(
                self._capacity, dtype=torch.int64, device="cpu"
            ).tensor_split(ends)
        self._rest = rest

    def _saved(self, tensors: dict[str, Tensor], part: str, device: str | None) -> Batch | None:
        """Return a part of a state by site, in the order of the sites; None if it has none."""
        if not any(name.startswith(part) for name in tensors):
            return None
        return {site: tensors[part + site].to(torch.device(device or "")) for site in self._source.widths}


def _rows_in(rows: Batch) -> int:
    return len(next(iter(rows.values())))


def _device(rows: Batch) -> torch.device:
    return next(iter(rows.values())).device


def _buffer_for(rows: Batch, capacity: int) -> Batch:
    """Return empty memory for `capacity` rows of every site."""
    return {site: each.new_empty(capacity, each.shape[1]) for site, each in rows.items()}


def _span(group: Tensor) -> str:
    return f"{int(group.min())} to {int(group.max())}"

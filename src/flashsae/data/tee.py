"""One reading of a stream for several shuffles of it, which read at the same pace."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from flashsae.data.sources import Chunk, Cursor, StreamSource, identity_of
from flashsae.data.split import Split
from flashsae.errors import CheckpointError


class _Epoch:
    """An epoch of the stream while it is read: what some readers have had and others not yet."""

    def __init__(self, chunks: Iterator[tuple[Chunk, Cursor]], cursor: Cursor | None, readers: int) -> None:
        self._chunks, self.cursor = chunks, cursor
        self._ahead: list[deque[tuple[Chunk, Cursor]]] = [deque() for _ in range(readers)]

    def next(self, reader: int) -> tuple[Chunk, Cursor] | None:
        """Return what comes next for a reader; None at the end."""
        if not self._ahead[reader]:
            item = next(self._chunks, None)
            if item is None:
                return None
            for ahead in self._ahead:
                ahead.append(item)
        return self._ahead[reader].popleft()


class Tee:
    """One pass over a stream, given to several readers: a language model runs once for all of them.

    Memory: the chunks between the reader that is ahead and the last one. Shuffle buffers of one size that give out
    batches in turn are never more than the filling of one buffer apart.

    Args:
        source: read forwards.
        readers: how many there are.
    """

    def __init__(self, source: StreamSource, readers: int) -> None:
        self._source, self._readers = source, readers
        self._epochs: dict[int, _Epoch] = {}
        self._begun = [0] * readers  # epochs of each reader

    def reader(self, number: int) -> StreamSource:
        """Return the stream as one of the readers sees it."""
        return _Reader(self, self._source, number)

    def read(self, number: int, cursor: Cursor | None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield the next epoch of training chunks to a reader.

        Raises:
            CheckpointError: it would begin elsewhere than the others.
        """
        place = self._begun[number]
        self._begun[number] += 1
        for old in [each for each in self._epochs if each < min(self._begun) - 1]:
            del self._epochs[old]
        if place not in self._epochs:
            self._epochs[place] = _Epoch(self._source.chunks("train", cursor), cursor, self._readers)
        epoch = self._epochs[place]
        if epoch.cursor != cursor:
            raise CheckpointError(
                f"{self._source.name}: expected all SAEs of a run at one place in the stream, got {cursor} beside "
                f"{epoch.cursor}. Resume with the checkpoints of one run, or start a new one."
            )
        while (item := epoch.next(number)) is not None:
            yield item


class _Reader:
    """What one reader sees of the stream: a `StreamSource`."""

    def __init__(self, tee: Tee, source: StreamSource, number: int) -> None:
        self._tee, self._source, self._number = tee, source, number
        self.name = source.name

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by site."""
        return self._source.widths

    @property
    def identity(self) -> dict[str, Any]:
        """That of the stream."""
        return identity_of(self._source)

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split; that of training is read once for all readers."""
        return self._tee.read(self._number, cursor) if split == "train" else self._source.chunks(split, cursor)

"""Documents cut into the inputs of a model: each in inputs of its own, or packed one behind another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flashsae.lm.encoding import Encoded
from flashsae.lm.framing import Framing

TEXT, SPECIAL, AGAIN = range(3)
"""What a piece is: text, tokens that are put around it, or text that was in the input before."""


class Piece(NamedTuple):
    """Consecutive tokens of an input.

    Args:
        start, stop: where they stand among all tokens of a block.
        document: place of their document in the block.
        kind: TEXT, SPECIAL or AGAIN.
    """

    start: int
    stop: int
    document: int
    kind: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.stop - self.start


Window = list[Piece]
"""One input of the model."""


@dataclass(frozen=True)
class Layout:
    """The tokens of inputs, one input behind another.

    Args:
        ids: [n], int64.
        document: [n], int64, place of the document in the block.
        kind: [n], int64, TEXT, SPECIAL or AGAIN.
        wanted: [n], bool, whether the document itself lets a token become a row.
        position: [n], int64, place of a token in its input.
        start: [inputs], int64, where an input begins.
        length: [inputs], int64.
    """

    ids: np.ndarray
    document: np.ndarray
    kind: np.ndarray
    wanted: np.ndarray
    position: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Cutter:
    """Cuts the documents of a block.

    Args:
        framing: what stands around text.
        length: most tokens of an input; more than the framing takes and `overlap`.
        overlap: tokens that an input repeats from the one before, where it goes on with a document.
    """

    def __init__(self, framing: Framing, length: int, overlap: int) -> None:
        self._framing, self._length, self._overlap = framing, length, overlap
        parts = (framing.first, framing.later, framing.suffix, framing.closing, framing.opening)
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        self._ids = np.array([token for part in parts for token in part], dtype=np.int64)
        self._first, self._later, self._suffix, self._closing, self._opening = pairwise(ends)

    def cut(self, documents: Sequence[Encoded], parts: Sequence[Sequence[int]] | None) -> Layout:
        """Cut documents.

        Args:
            documents: of a block.
            parts: places of documents that may stand in one input together; None: every document has inputs of its own.
        """
        bounds = np.cumsum([len(self._ids), *(len(each.ids) for each in documents)]).tolist()
        if parts is None:
            windows = [window for place in range(len(documents)) for window in self._apart(place, bounds)]
        else:
            packed = [window for part in parts for window in self._packed(part, bounds)]
            windows = sorted(packed, key=lambda window: window[0].document)
        ids = np.concatenate([self._ids, *(each.ids for each in documents)])
        wanted = np.ones(len(ids), dtype=bool)
        for start, each in zip(bounds, documents):
            if each.keep is not None:
                wanted[start : start + len(each.keep)] = each.keep
        return _laid_out(windows, ids, wanted)

    def _apart(self, place: int, bounds: Sequence[int]) -> Iterator[Window]:
        begin, end = bounds[place], bounds[place + 1]
        at = begin
        while at < end:
            window, room = self._begun(place, at, begin)
            window.append(Piece(at, min(at + room, end), place, TEXT))
            at = window[-1].stop
            yield self._ended(window)

    def _packed(self, places: Sequence[int], bounds: Sequence[int]) -> Iterator[Window]:
        window: Window = []
        room = 0
        for place in places:
            begin, end = bounds[place], bounds[place + 1]
            if begin == end:
                continue
            room = self._followed(window, room, place)
            at = begin
            while at < end:
                if not room:
                    if window:
                        yield self._ended(window)
                    window, room = self._begun(place, at, begin)
                window.append(Piece(at, min(at + room, end), place, TEXT))
                at = window[-1].stop
                room -= window[-1].size
        if window:
            yield self._ended(window)

    def _followed(self, window: Window, room: int, place: int) -> int:
        """Add to an input what stands before another document; return the room for this, 0 if it needs a new input."""
        closing, opening = len(self._framing.closing), len(self._framing.opening)
        fits = bool(window) and room > closing + opening
        if fits or (window and room == closing and not self._framing.suffix):  # with which the input is whole
            window.append(Piece(*self._closing, window[-1].document, SPECIAL))
        if not fits:
            return 0
        window.append(Piece(*self._opening, place, SPECIAL))
        return room - closing - opening

    def _begun(self, place: int, at: int, begin: int) -> tuple[Window, int]:
        """Return an input that is to hold a document, which begins at `begin`, from `at` on, and the room in it."""
        before = Piece(*(self._first if at == begin else self._later), place, SPECIAL)
        again = Piece(at - min(self._overlap, at - begin), at, place, AGAIN)
        return [before, again], self._length - before.size - again.size - len(self._framing.suffix)

    def _ended(self, window: Window) -> Window:
        return [*window, Piece(*self._suffix, window[-1].document, SPECIAL)]


def _laid_out(windows: Sequence[Window], ids: np.ndarray, wanted: np.ndarray) -> Layout:
    pieces = [piece for window in windows for piece in window]
    start, stop, document, kind = np.array(pieces, dtype=np.int64).reshape(-1, 4).T
    size = stop - start
    behind = size.cumsum()
    place = np.arange(size.sum()) + np.repeat(start - (behind - size), size)
    last = np.cumsum([len(window) for window in windows], dtype=np.int64) - 1  # piece of each input
    length = np.diff(behind[last], prepend=0)
    starts = length.cumsum() - length
    return Layout(
        ids[place],
        np.repeat(document, size),
        np.repeat(kind, size),
        wanted[place],
        np.arange(size.sum()) - np.repeat(starts, length),
        starts,
        length,
    )

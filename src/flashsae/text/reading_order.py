"""The order in which documents are read: block by block, as they come or mixed, and on from any block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from flashsae.files.fingerprint import text_digest
from flashsae.text.content import Block, Content

_Placed: TypeAlias = tuple[int, int, Content]
_WINDOW_CHARACTERS = 1 << 24
"""Characters of documents that are mixed with each other, and that are in memory for it: some thousand web pages."""


@dataclass(frozen=True)
class Place:
    """Where a block begins.

    Args:
        document: place of the first document of its window, in the order of the data set.
        offset: documents of that window that come before the block in the order of reading.
    """

    document: int
    offset: int


@dataclass(frozen=True)
class ReadingOrder:
    """Documents in blocks.

    Args:
        block_characters: least characters of a block, but for the last one of a window.
        seed: of the order; None keeps that of the data set.
    """

    block_characters: int
    seed: int | None = None

    def blocks(self, documents: Iterable[_Placed], offset: int) -> Iterator[tuple[Block, Place, Place]]:
        """Yield blocks, each with the place where it begins and that of the block behind it.

        Documents are cut into windows of consecutive ones. The order in a window is a function of the seed and of the
        place of its first document alone, so reading can begin at any window.

        Args:
            documents: (place, number, document) with ascending places, from the beginning of a window on.
            offset: documents of the first window to leave out.
        """
        size = self.block_characters if self.seed is None else max(self.block_characters, _WINDOW_CHARACTERS)
        for window in _cut(documents, size):
            first, behind = window[0][0], Place(window[-1][0] + 1, 0)
            for block in _cut(self._ordered(window)[offset:], self.block_characters):
                begin, offset = Place(first, offset), offset + len(block)
                yield [each[1:] for each in block], begin, behind if offset == len(window) else Place(first, offset)
            offset = 0

    def _ordered(self, window: list[_Placed]) -> list[_Placed]:
        if self.seed is None:
            return window
        digits = text_digest([f"documents {self.seed} {window[0][0]}"])
        generator = torch.Generator().manual_seed(int(digits, 16))
        return [
            window[i]
            for i in torch.randperm(len(window), generator=generator, dtype=torch.int64, device="cpu").tolist()
        ]


def _cut(documents: Iterable[_Placed], characters: int) -> Iterator[list[_Placed]]:
    """Yield lists of consecutive documents of at least so many characters, and the rest."""
    part: list[_Placed] = []
    room = characters
    for placed in documents:
        part.append(placed)
        room -= len(placed[2])
        if room <= 0:
            yield part
            part, room = [], characters
    if part:
        yield part

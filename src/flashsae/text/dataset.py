"""Numbered documents: what every text is to those who read it, wherever it comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from flashsae.files.fingerprint import text_digest
from flashsae.text.content import Chat, Content, encodable, is_blank

Rows: TypeAlias = Iterator[tuple[int, Content]]


class Documents(Protocol):
    """Documents that can be read in any order."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Content: ...


@dataclass(frozen=True)
class TextDataset:
    """Documents at places 0, 1, 2 ... that can be read from any place on.

    The number of a document stays its own, also where the order of reading is another; it decides the split. In the
    order of a data set, which is the usual one, number and place are the same.

    Args:
        name: for messages and for the index of a cache; says which text this is, not only where it lies.
        rows: called with a place, yields (number, document) of this place and of each behind it; may yield blank ones.
            A document is text, `Tokens` or a `Chat`.
        identify: returns the fingerprint; None takes the name for it.
        n_documents: how many there are, blank ones included, where that is known without reading all.
        is_cut_at_blanks: documents are what stands between blank lines, which not everybody expects.
        in_any_order: returns the documents by number; None where they can be read only one behind the other.
    """

    name: str
    rows: Callable[[int], Rows]
    identify: Callable[[], str] | None = None
    n_documents: int | None = None
    is_cut_at_blanks: bool = False
    in_any_order: Callable[[], Documents] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the documents and their numbers, the same wherever the text lies."""
        return text_digest([self.name]) if self.identify is None else self.identify()

    @functools.cached_property
    def first(self) -> Content | None:
        """The first document; None if there is none."""
        return next(self.documents(), None)

    @property
    def holds_chats(self) -> bool:
        """Whether there are chats in it, by the first document."""
        return isinstance(self.first, Chat)

    def placed(self, start: int = 0) -> Iterator[tuple[int, int, Content]]:
        """Yield (place, number, document) from place `start` on; blank documents are left out.

        Raises:
            DataError: a row cannot be read; names it.
        """
        return (
            (place, number, encodable(content))
            for place, (number, content) in enumerate(self.rows(start), start)
            if not is_blank(content)
        )

    def numbered(self, start: int = 0) -> Rows:
        """Yield (number, document): see `placed`."""
        return ((number, content) for _, number, content in self.placed(start))

    def documents(self, start: int = 0) -> Iterator[Content]:
        """Yield the documents: see `placed`."""
        return (content for _, _, content in self.placed(start))

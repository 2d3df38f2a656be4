"""Numbered documents: what every text is to those who read it, wherever it comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from flashsae.fingerprint import text_digest
from flashsae.text.content import Content, encodable, is_blank

Rows: TypeAlias = Iterator[tuple[int, Content]]


@dataclass(frozen=True)
class TextDataset:
    """Numbered documents that can be read from any number on.

    Args:
        name: for messages and for the index of a cache; says which text this is, not only where it lies.
        rows: called with a number, yields (number, document) from there on; may yield blank ones. A document is text,
            `Tokens` or a `Chat`.
        identify: returns the fingerprint; None takes the name for it.
        n_documents: how many there are, blank ones included, where that is known without reading all.
        is_cut_at_blanks: documents are what stands between blank lines, which not everybody expects.
    """

    name: str
    rows: Callable[[int], Rows]
    identify: Callable[[], str] | None = None
    n_documents: int | None = None
    is_cut_at_blanks: bool = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the documents and their numbers, the same wherever the text lies."""
        return text_digest([self.name]) if self.identify is None else self.identify()

    def numbered(self, start: int = 0) -> Rows:
        """Yield (number, document) from number `start` on; blank documents are left out with their numbers.

        Raises:
            DataError: a row cannot be read; names it.
        """
        return ((number, encodable(content)) for number, content in self.rows(start) if not is_blank(content))

    def documents(self, start: int = 0) -> Iterator[Content]:
        """Yield the documents from number `start` on."""
        return (content for _, content in self.numbered(start))

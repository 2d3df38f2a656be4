"""The kinds of files that text may be in, and how the documents of several files follow each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashsae.text import plain, tables
from flashsae.text.columns import Columns
from flashsae.text.content import Content
from flashsae.text.streams import COMPRESSIONS, kind_of


@dataclass(frozen=True)
class Kind:
    """How files of a kind are read.

    Args:
        read: yields documents from a number on, and returns how many a file has.
        names: returns the columns of a file; None where it has none. None itself: this kind has none.
        count: returns how many documents a file has, where that is known without reading it.
        packed: the compressions that may stand around it.
    """

    read: Callable[[Path, Columns, int], plain.Documents]
    names: Callable[[Path], list[str] | None] | None = None
    count: Callable[[Path], int] | None = None
    packed: tuple[str, ...] = COMPRESSIONS


KINDS = {
    ".txt": Kind(plain.read_txt),
    ".jsonl": Kind(plain.read_json_lines, plain.names_in_json),
    ".json": Kind(plain.read_json, plain.names_in_json),
    ".csv": Kind(tables.read_csv, tables.names_in_csv),
    ".tsv": Kind(tables.read_csv, tables.names_in_csv),
    ".parquet": Kind(tables.read_parquet, tables.names_in_parquet, tables.count_parquet, packed=()),
    ".arrow": Kind(tables.read_arrow, tables.names_in_arrow),
}


def columns_of(files: Sequence[Path], asked: str | None) -> Columns | None:
    """Return which columns are read of files; None where none of them has any.

    Args:
        files: in the order of reading.
        asked: the setting.
    """
    with_columns = [file for file in files if KINDS[kind_of(file)].names is not None]
    if not with_columns:
        return None
    for file in with_columns if asked is None or "," in asked else ():
        names = KINDS[kind_of(file)].names
        there = names(file) if names is not None else None
        if there:
            return Columns.of(asked, there)
    return Columns.of(asked, ())


def contents(files: Sequence[Path], columns: Columns, start: int) -> Iterator[Content]:
    """Yield the documents of files in their order, from number `start` on."""
    for file in files:
        kind = KINDS[kind_of(file)]
        n_documents = kind.count(file) if start and kind.count is not None else None
        if n_documents is None or start < n_documents:
            n_documents = yield from kind.read(file, columns, start)
        start = max(0, start - n_documents)

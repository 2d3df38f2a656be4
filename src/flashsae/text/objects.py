"""Texts that a program has: lists, data sets of the library datasets, generators, and functions that return such."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from flashsae.errors import ConfigError, DataError, FlashSAEError, first_line
from flashsae.files.fingerprint import digest, text_digest
from flashsae.text.asked import ALL, AskedText
from flashsae.text.columns import Columns, chat_of
from flashsae.text.content import Chat, Content, Tokens
from flashsae.text.dataset import Rows, TextDataset
from flashsae.text.spool import Spool, packed

_BATCH = 256
_TOLD = 64
"""Documents that a stream is told apart by, since it cannot be read twice to its end."""


def open_object(texts: Any, asked: AskedText) -> TextDataset:
    """Open documents that a program has: see `open_text`."""
    datasets = sys.modules.get("datasets")  # whoever has an object of it has imported it
    of_library = getattr(datasets, "Dataset", ()), getattr(datasets, "IterableDataset", ())
    if isinstance(texts, Mapping) and type(texts).__name__ in ("DatasetDict", "IterableDatasetDict"):
        return open_object(_of_split(texts, asked), _without_split(asked))
    if isinstance(texts, of_library[0]):
        asked.refuse("a data set in memory", *(name for name in ALL if name != "column"))
        columns = Columns.of(asked.column, texts.column_names)
        return of_table(texts, columns, f"a data set of {len(texts)} rows ({columns})")
    if isinstance(texts, of_library[1]):
        asked.refuse("a data set that is streamed", *(name for name in ALL if name != "column"))
        return _repeatable(texts, "a streamed data set", asked.column, lambda start: iter(texts.skip(start)))
    if hasattr(texts, "columns") and hasattr(texts, "to_dict"):  # of pandas
        texts = texts.to_dict(orient="records")
    texts = next((getattr(texts, name)() for name in ("to_pylist", "tolist") if hasattr(texts, name)), texts)
    if hasattr(texts, "__getitem__") and hasattr(texts, "__len__") and not isinstance(texts, Iterable):
        return open_object(functools.partial(_by_number, texts), asked)  # a data set of torch
    if isinstance(texts, Sequence) and not isinstance(texts, str | bytes | bytearray):
        return _of_list(texts, asked)
    if isinstance(texts, Iterator):
        return _once(texts, asked)
    read = texts if callable(texts) else None
    if read is None and (not isinstance(texts, Iterable) or isinstance(texts, str | bytes | bytearray | set | Mapping)):
        raise DataError(
            "text: expected a name, a path, a list of strings, a data set, a generator or a function that returns one, "
            f"got {type(texts).__name__}."
        )
    asked.refuse("this text", *(name for name in ALL if name != "column"))
    return _repeatable(texts, "a stream of documents", asked.column, lambda start: islice(_begun(texts), start, None))


def _by_number(texts: Any) -> Iterator[Any]:
    return (texts[i] for i in range(len(texts)))


def _begun(texts: Any) -> Iterator[Any]:
    """Return an iterator from the beginning of what can be read again and again."""
    found = texts() if callable(texts) else texts
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | set | Mapping):
        raise DataError(f"text: expected a function that returns an iterator, got one of {type(found).__name__}.")
    return iter(found)


def _of_split(texts: Mapping[str, Any], asked: AskedText) -> Any:
    split = asked.split or ("train" if "train" in texts or len(texts) != 1 else next(iter(texts)))
    if split not in texts:
        raise ConfigError(f"text_split: this data set has the splits {', '.join(texts)}, got {split!r}. Name one.")
    return texts[split]


def _without_split(asked: AskedText) -> AskedText:
    return AskedText(**{**vars(asked), "split": None})


@dataclass(frozen=True)
class _Table:
    """The documents of a data set of the library datasets, each read when it is asked for."""

    rows: Any
    columns: Columns
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int, /) -> Content:
        return self.columns.content(self.rows[place], f"{self.name}, row {place}")

    def from_place(self, start: int) -> Rows:
        for begin in range(start, len(self.rows), _BATCH):
            batch = self.rows[begin : begin + _BATCH]
            for place, row in enumerate(zip(*batch.values()), start=begin):
                yield place, self.columns.content(dict(zip(batch, row)), f"{self.name}, row {place}")


def of_table(rows: Any, columns: Columns, name: str, identify: Callable[[], str] | None = None) -> TextDataset:
    """Return the documents of a `datasets.Dataset`.

    Args:
        rows: the data set, whatever its format.
        columns: which of its columns hold them.
        name: for messages.
        identify: returns the fingerprint; None reads all documents for it.
    """
    rows = rows.with_format(None).select_columns(columns.to_read(rows.column_names, name))
    table = _Table(rows, columns, name)
    return TextDataset(
        name,
        table.from_place,
        identify or (lambda: _digest(content for _, content in table.from_place(0))),
        len(rows),
        in_any_order=lambda: table,
    )


def _of_list(texts: Sequence[Any], asked: AskedText) -> TextDataset:
    rows = next((text for text in texts if isinstance(text, Mapping)), None)
    asked.refuse("this text", *(name for name in ALL if name != "column" or rows is None))
    columns = None if rows is None else Columns.of(asked.column, rows)
    return in_memory("a list of", tuple(_content(text, i, columns) for i, text in enumerate(texts)), "texts")


def in_memory(what: str, contents: tuple[Content, ...], unit: str) -> TextDataset:
    """Return documents that are in memory; named after what they are, how many, and their digest."""
    told = _digest(contents)
    name = f"{what} {len(contents)} {unit} (sha256 {told})"
    return TextDataset(
        name,
        lambda start: islice(enumerate(contents), start, None),
        lambda: told,
        len(contents),
        in_any_order=lambda: contents,
    )


def _repeatable(texts: Any, what: str, column: str | None, begin: Callable[[int], Iterator[Any]]) -> TextDataset:
    """Return what can be read from its beginning again and again, one document behind the other.

    Args:
        texts: to be named in messages.
        what: it is, in words.
        column: that is asked for.
        begin: called with a number, returns an iterator of what stands there and behind.
    """
    first = next(_guarded(begin(0), what, 0), None)
    columns = Columns.of(column, first) if isinstance(first, Mapping) else None
    if columns is None and column is not None:
        AskedText(column=column).refuse("this text", "column")

    told = None if first is None else packed(_content(first, 0, columns))

    def contents(start: int) -> Iterator[Content]:
        place = start
        for text in _guarded(begin(start), what, start):
            content = _content(text, place, columns)
            if place == 0 and packed(content) != told:
                raise _another(what)
            yield content
            place += 1
        if place == 0 and told is not None:
            raise _another(what)

    def identify() -> str:
        return text_digest([what, _digest(islice(contents(0), _TOLD))])

    name = f"{what} ({columns})" if columns is not None else what
    return TextDataset(name, lambda start: enumerate(contents(start), start), identify)


def _another(what: str) -> DataError:
    return DataError(
        f"{what} begins with another document when it is read again. A function has to return a new iterator over the "
        "same documents, in the same order, each time; what can be read but once, give as it is."
    )


def _once(texts: Iterator[Any], asked: AskedText) -> TextDataset:
    """Return what can be read only once; what it gave is kept in a temporary file for whoever reads it again."""
    asked.refuse("a generator", *(name for name in ALL if name != "column"))
    what = "a generator of documents"
    guarded = _guarded(texts, what, 0)
    first = next(guarded, None)
    columns = Columns.of(asked.column, first) if isinstance(first, Mapping) else None
    if columns is None:
        asked.refuse("this text", "column")
    rest = (_content(text, i, columns) for i, text in enumerate(guarded, start=1))
    spool = Spool(rest if first is None else _chained(_content(first, 0, columns), rest))

    def identify() -> str:
        return text_digest([what, _digest(content for _, content in islice(spool.rows(0), _TOLD))])

    return TextDataset(what, spool.rows, identify, in_any_order=lambda: spool)


def _chained(first: Content, rest: Iterator[Content]) -> Iterator[Content]:
    yield first
    yield from rest


def _guarded(texts: Iterator[Any], what: str, start: int) -> Iterator[Any]:
    """Yield what somebody else's iterator gives; its errors become one sentence with the number of the document."""
    number = start
    while True:
        try:
            text = next(texts)
        except StopIteration:
            return
        except FlashSAEError:
            raise
        except Exception as error:
            raise DataError(
                f"{what} fails at document {number} with {type(error).__name__}: {first_line(error)} Repair it, or end "
                "it before."
            ) from error
        yield text
        number += 1


def _content(text: Any, place: int, columns: Columns | None) -> Content:
    """Return the document that an entry of a list is, or what an iterator gives."""
    if isinstance(text, str | Tokens | Chat):
        return text
    if not isinstance(text, np.ndarray) and hasattr(text, "tolist"):  # a tensor
        text = text.tolist()
    try:
        if columns is not None:
            return columns.content(text, f"text: index {place}")
        if isinstance(text, list | tuple | np.ndarray) and (
            len(text) == 0 or isinstance(text[0], int | np.integer)  # no token is a document without a word
        ):
            return Tokens(text)
        if isinstance(text, list | tuple) and len(text) and isinstance(text[0], Mapping):
            return chat_of(text)
    except DataError as error:
        raise error if columns is not None else DataError(f"text: index {place}: {error}") from None
    raise DataError(f"text: expected a list of strings, got {type(text).__name__} at index {place}.")


def _digest(contents: Iterable[Content]) -> str:
    """Return digits that stand for documents: those of their strings where all are text."""
    return digest(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else packed(content)
        for content in contents
    )

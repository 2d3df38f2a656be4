"""Text to read: the documents of a file, a folder, a list, a Hugging Face data set, or of Python itself.

Every data set numbers its documents once and for all; the number decides the split and where to resume.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from flashsae.data.fingerprint import files_digest, text_digest
from flashsae.data.python_docs import python_docs
from flashsae.data.text_files import READERS, field_of, find_files, first_line
from flashsae.errors import DataError, FlashSAEError, require
from flashsae.settings.reading import PYTHON_DOCS

Rows: TypeAlias = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class TextDataset:
    """Numbered documents that can be read from any number on.

    Args:
        name: for messages and for the index of a cache; says which text this is, not only where it lies.
        rows: called with a number, yields (number, text) from there on; may yield blank texts.
        identify: returns the fingerprint; None takes the name for it.
        n_documents: how many there are, blank ones included, where that is known without reading all.
    """

    name: str
    rows: Callable[[int], Rows]
    identify: Callable[[], str] | None = None
    n_documents: int | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the documents and their numbers, the same wherever the text lies."""
        return text_digest([self.name]) if self.identify is None else self.identify()

    def numbered(self, start: int = 0) -> Rows:
        """Yield (number, document) from number `start` on; blank documents are left out with their numbers.

        Raises:
            DataError: a row cannot be read; names it.
        """
        return ((number, text) for number, text in self.rows(start) if text.strip())

    def documents(self, start: int = 0) -> Iterator[str]:
        """Yield the documents from number `start` on."""
        return (text for _, text in self.numbered(start))


def open_text(
    dataset: str | Path | Sequence[str],
    *,
    split: str = "train",
    column: str = "text",
    subset: str | None = None,
) -> TextDataset:
    """Open a data set of documents; nothing but its beginning is read.

    Args:
        dataset: ``"python-docs"``, the documentation that comes with Python (about half a million tokens of
            English, no download); a .txt (paragraphs between blank lines), .jsonl, .json or .parquet file; a
            folder or a glob pattern of such; a data set's name on the Hugging Face hub; or the texts themselves.
        split: of a hub data set.
        column: the field that holds the text, in .jsonl, .json, .parquet and hub data sets.
        subset: of a hub data set, where it has several.
    Raises:
        DataError: there is no such data, its kind is unknown, it is damaged or empty, or lacks the column.
        MissingExtraError: a parquet file or a hub data set needs the extra `hf`.
    """
    if isinstance(dataset, Path) or (isinstance(dataset, str) and _looks_local(dataset)):
        text = _from_files(Path(dataset).expanduser(), column)
    elif isinstance(dataset, str):
        text = _from_python_docs() if dataset == PYTHON_DOCS else _from_hub(dataset, subset, split, column)
    else:
        text = _from_list(dataset)
    if next(text.numbered(), None) is None:
        raise DataError(f"{text.name} is empty: expected at least one document that is not blank.")
    return text


def _numbered(texts: Iterable[str], start: int) -> Rows:
    return islice(enumerate(texts), start, None)


def _from_list(texts: Sequence[str]) -> TextDataset:
    if not isinstance(texts, Sequence):
        raise DataError(f"text: expected a name, a path or a list of strings, got {type(texts).__name__}.")
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        found = type(texts[wrong]).__name__
        raise DataError(f"text: expected a list of strings, got {found} at index {wrong}.")
    return _in_memory("a list of", tuple(texts), "texts")


def _from_python_docs() -> TextDataset:
    return _in_memory(f"{PYTHON_DOCS}:", python_docs(), "documents")


def _in_memory(what: str, texts: tuple[str, ...], unit: str) -> TextDataset:
    digest = text_digest(texts)
    name = f"{what} {len(texts)} {unit} (sha256 {digest})"
    return TextDataset(name, functools.partial(_numbered, texts), lambda: digest, len(texts))


def _looks_local(dataset: str) -> bool:
    """Tell a path from a name on the hub, which is ``owner/name``, or of old a ``name`` without a suffix."""
    if dataset == PYTHON_DOCS:
        return False
    path = Path(dataset).expanduser()
    hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+|\w[\w-]*", dataset)
    return path.exists() or path.suffix.lower() in READERS or not hub_name


def _from_files(path: Path, column: str) -> TextDataset:
    files = find_files(path)
    digest = files_digest(files, names=False)
    size = sum(file.stat().st_size for file in files)
    of = "" if all(file.suffix.lower() == ".txt" for file in files) else f", column {column!r}"
    name = f"{path.resolve()} ({len(files)} file{'s' * (len(files) > 1)}, {size} bytes{of}, sha256 {digest})"

    def rows(start: int) -> Rows:
        return _numbered(chain.from_iterable(READERS[f.suffix.lower()](f, column) for f in files), start)

    return TextDataset(name, rows, lambda: _with_column(digest, of))


def _with_column(digest: str, of: str) -> str:
    return text_digest([digest, of]) if of else digest


def _from_hub(dataset: str, subset: str | None, split: str, column: str) -> TextDataset:
    datasets = require("datasets", "hf")
    name = f"{dataset}{f'/{subset}' if subset else ''} (split {split!r}, column {column!r})"

    def rows(start: int) -> Rows:
        number = start
        try:
            stream = datasets.load_dataset(dataset, subset, split=split, streaming=True)
            for row in stream.skip(start):
                yield number, field_of(row, column, f"{name}, row {number}")
                number += 1
        except FlashSAEError:
            raise
        except Exception as error:  # the library's own, the network's, and those of what parses the files
            raise DataError(
                f"{dataset!r} is no file here, and the Hugging Face hub does not give {name} at row {number}: "
                f"{first_line(error)} Check the name, the subset, the split and the connection."
            ) from error

    return TextDataset(name, rows, lambda: _hub_digest(datasets, dataset, subset, name))


def _hub_digest(datasets: Any, dataset: str, subset: str | None, name: str) -> str:
    """Return digits that stand for the revision of a data set; for its name alone where the hub tells no revision."""
    try:
        revision = str(datasets.load_dataset_builder(dataset, subset).hash)
    except Exception:  # the library's own, the network's; reading raises them with a sentence
        revision = ""
    return text_digest([name, revision])

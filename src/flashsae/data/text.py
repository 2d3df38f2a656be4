"""Text to read: the documents of a file, a folder, a list, a Hugging Face data set, or of Python itself.

Every data set numbers its documents once and for all; the number decides the split and where to resume.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from flashsae.data.python_docs import python_docs
from flashsae.errors import DataError, FlashSAEError, require
from flashsae.settings.reading import PYTHON_DOCS

_FINGERPRINT_BYTES = 1 << 16

Rows: TypeAlias = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class TextDataset:
    """Numbered documents that can be read from any number on.

    Args:
        name: for messages and for the index of a cache; says which text this is, not only where it lies.
        rows: called with a number, yields (number, text) from there on; may yield blank texts.
    """

    name: str
    rows: Callable[[int], Rows]

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


def _digest(parts: Iterable[bytes]) -> str:
    """Return 12 hexadecimal digits that stand for `parts`, boundaries included."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:12]


def _numbered(texts: Iterable[str], start: int) -> Rows:
    return islice(enumerate(texts), start, None)


def _from_list(texts: Sequence[str]) -> TextDataset:
    if not isinstance(texts, Sequence):
        raise DataError(f"text: expected a name, a path or a list of strings, got {type(texts).__name__}.")
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        found = type(texts[wrong]).__name__
        raise DataError(f"text: expected a list of strings, got {found} at index {wrong}.")
    kept = tuple(texts)
    name = f"a list of {len(kept)} texts (sha256 {_digest(text.encode() for text in kept)})"
    return TextDataset(name, functools.partial(_numbered, kept))


def _from_python_docs() -> TextDataset:
    texts = python_docs()
    name = f"{PYTHON_DOCS} ({len(texts)} documents, sha256 {_digest(text.encode() for text in texts)})"
    return TextDataset(name, functools.partial(_numbered, texts))


def _looks_local(dataset: str) -> bool:
    """Tell a path from a name on the hub, which is ``owner/name``, or of old a ``name`` without a suffix."""
    if dataset == PYTHON_DOCS:
        return False
    path = Path(dataset).expanduser()
    hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+|\w[\w-]*", dataset)
    return path.exists() or path.suffix.lower() in _READERS or not hub_name


def _from_files(path: Path, column: str) -> TextDataset:
    files = _files(path)
    digest = _digest(part for file in files for part in _fingerprint(file))
    size = sum(file.stat().st_size for file in files)
    of = "" if all(file.suffix.lower() == ".txt" for file in files) else f", column {column!r}"
    name = f"{path.resolve()} ({len(files)} file{'s' * (len(files) > 1)}, {size} bytes{of}, sha256 {digest})"

    def rows(start: int) -> Rows:
        return _numbered(chain.from_iterable(_READERS[f.suffix.lower()](f, column) for f in files), start)

    return TextDataset(name, rows)


def _files(path: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"{path}: cannot read a '{path.suffix}' file as text; expected one of {known}.")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.is_file() and file.suffix.lower() in _READERS)
    if not files:
        what = f"it holds no file ending in {known}" if path.is_dir() else "no such file, folder or match"
        raise DataError(f"text {str(path)!r}: {what}. Check the path (relative paths start at {Path.cwd()}).")
    return files


def _fingerprint(file: Path) -> Iterator[bytes]:
    """Yield the name, the size, the first and the last bytes: enough to notice that a file is another."""
    size = file.stat().st_size
    yield file.name.encode()
    yield str(size).encode()
    with open(file, "rb") as stream:
        yield stream.read(_FINGERPRINT_BYTES)
        stream.seek(max(0, size - _FINGERPRINT_BYTES))
        yield stream.read()


def _read_txt(file: Path, column: str) -> Iterator[str]:
    paragraph: list[str] = []
    for _, line in _lines(file):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip("\n")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(file, encoding="utf-8") as stream:
            yield from enumerate(stream, start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error


def _read_json_lines(file: Path, column: str) -> Iterator[str]:
    for number, line in _lines(file):
        if line.strip():
            yield _field(_parse(line, f"{file}, line {number}"), column, f"{file}, line {number}")


def _read_json(file: Path, column: str) -> Iterator[str]:
    """Read one JSON list of objects or strings; a file that starts otherwise holds JSON lines."""
    first = next((line.lstrip() for _, line in _lines(file) if line.strip()), "")
    if not first.startswith("["):
        yield from _read_json_lines(file, column)
        return
    rows = _parse("".join(line for _, line in _lines(file)), str(file))
    for number, row in enumerate(rows):
        yield row if isinstance(row, str) else _field(row, column, f"{file}, entry {number}")


def _parse(source: str, where: str) -> Any:
    try:
        return json.loads(source)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); repair it or take it out.") from error


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", "hf")
    try:
        with parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise _missing_column(column, table.schema_arrow.names, str(file))
            for batch in table.iter_batches(columns=[column], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    yield _text(text, column, str(file))
    except FlashSAEError:
        raise
    except Exception as error:  # pyarrow's errors have no common base
        raise DataError(f"{file} is no parquet file, or a damaged one: {_first_line(error)}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with the field {column!r}, got {type(row).__name__}.")
    if column not in row:
        raise _missing_column(column, row, where)
    return _text(row[column], column, where)


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} should hold text, got {type(value).__name__}; choose another column."
        )
    return value


def _missing_column(column: str, columns: Iterable[str], where: str) -> DataError:
    names = ", ".join(map(repr, columns)) or "no column at all"
    return DataError(
        f"{where}: there is no column {column!r}; it has {names}. Name the right one with --text-column (column=)."
    )


def _from_hub(dataset: str, subset: str | None, split: str, column: str) -> TextDataset:
    datasets = require("datasets", "hf")
    name = f"{dataset}{f'/{subset}' if subset else ''} (split {split!r}, column {column!r})"

    def rows(start: int) -> Rows:
        number = start
        try:
            stream = datasets.load_dataset(dataset, subset, split=split, streaming=True)
            for row in stream.skip(start):
                yield number, _field(row, column, f"{name}, row {number}")
                number += 1
        except FlashSAEError:
            raise
        except Exception as error:  # the library's own, the network's, and those of what parses the files
            raise DataError(
                f"{dataset!r} is no file here, and the Hugging Face hub does not give {name} at row {number}: "
                f"{_first_line(error)} Check the name, the subset, the split and the connection."
            ) from error

    return TextDataset(name, rows)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".") + "."

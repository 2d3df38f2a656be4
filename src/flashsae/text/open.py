"""Text to read: the documents of a file, a folder, a list, a Hugging Face data set, or of Python itself.

Every data set numbers its documents once and for all; the number decides the split and where to resume.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flashsae.errors import ConfigError, DataError, FlashSAEError, require
from flashsae.fingerprint import files_digest, text_digest
from flashsae.settings.kinds import expand
from flashsae.settings.reading import PYTHON_DOCS
from flashsae.text.dataset import Rows, TextDataset
from flashsae.text.python_docs import python_docs
from flashsae.text.text_files import READERS, field_of, files_of_split, find_files, first_line


def open_text(
    dataset: str | Path | Sequence[str],
    *,
    split: str | None = None,
    column: str | None = None,
    subset: str | None = None,
) -> TextDataset:
    """Open a data set of documents; nothing but its beginning is read.

    Args:
        dataset: ``"python-docs"``, the documentation that comes with Python (about half a million tokens of
            English, no download); a .txt (a document is what stands between blank lines), .jsonl, .json or .parquet
            file; a folder or a glob pattern of such, hidden files left out, and runs, caches and saved SAEs; a data
            set's name on the Hugging Face hub; or the texts themselves.
        split: of a hub data set, or of a folder whose files or folders are named after splits. None: train; all files
            where none is named so.
        column: the field that holds the text, in .jsonl, .json, .parquet and hub data sets. None: text.
        subset: of a hub data set, where it has several.
    Raises:
        DataError: there is no such data, its kind is unknown, it is damaged or empty, or lacks the column.
        ConfigError: a setting means nothing for this kind of data.
        MissingExtraError: a parquet file or a hub data set needs the extra `hf`.
    """
    if isinstance(dataset, Path) or (isinstance(dataset, str) and _looks_local(dataset)):
        _refuse("a file or folder", text_subset=subset)
        text = _from_files(expand(dataset, "dataset"), split, column)
    elif isinstance(dataset, str) and dataset != PYTHON_DOCS:
        text = _from_hub(dataset, subset, split or "train", column or "text")
    else:
        _refuse("this text", text_split=split, text_column=column, text_subset=subset)
        text = _from_python_docs() if isinstance(dataset, str) else _from_list(dataset)
    if next(text.numbered(), None) is None:
        raise DataError(f"{text.name} is empty: expected at least one document that is not blank.")
    return text


def _refuse(what: str, **settings: str | None) -> None:
    """Raise ConfigError where a setting is given that means nothing for the text."""
    for name, value in settings.items():
        if value is not None:
            raise ConfigError(f"{name}: expected nothing beside {what}, which has no such thing, got {value!r}.")


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
    path = expand(dataset, "dataset")
    hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+|\w[\w-]*", dataset)
    return path.exists() or path.suffix.lower() in READERS or not hub_name


def _from_files(path: Path, split: str | None, column: str | None) -> TextDataset:
    files, of_split = files_of_split(path, find_files(path), split)
    if is_txt := all(file.suffix.lower() == ".txt" for file in files):
        _refuse(".txt files", text_column=column)
        cut = ", a document between blank lines"
    else:
        cut = f", column {column or 'text'!r}"
    digest = files_digest(files, names=False)
    size = sum(file.stat().st_size for file in files)
    what = f"{len(files)} file{'s' * (len(files) > 1)}{of_split}, {size} bytes{cut}"

    def rows(start: int) -> Rows:
        readers = (READERS[file.suffix.lower()](file, column or "text") for file in files)
        return _numbered(chain.from_iterable(readers), start)

    name = f"{path.resolve()} ({what}, sha256 {digest})"
    return TextDataset(name, rows, lambda: text_digest([digest, cut]), is_cut_at_blanks=is_txt)


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

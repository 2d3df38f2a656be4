"""Text to read: the documents of files, folders, repositories, data sets of the hub, of a program, or of Python itself.

Every data set numbers its documents once and for all; the number decides the split and where to resume.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from flashsae.errors import ConfigError, DataError
from flashsae.files.fingerprint import files_digest, text_digest
from flashsae.settings.kinds import expand
from flashsae.settings.reading import PYTHON_DOCS
from flashsae.text.asked import ALL, OF_HUB, OF_TOKENS, AskedText
from flashsae.text.columns import Columns
from flashsae.text.content import Content
from flashsae.text.dataset import Documents, Rows, TextDataset
from flashsae.text.hub import open_hub
from flashsae.text.mixture import mixed
from flashsae.text.objects import in_memory, open_object
from flashsae.text.python_docs import python_docs
from flashsae.text.readers import columns_of, contents
from flashsae.text.repositories import files_in_card, snapshot_of
from flashsae.text.spool import Spool
from flashsae.text.streams import is_compressed, kind_of
from flashsae.text.text_files import ALL_KINDS, files_of_split, find_files
from flashsae.text.token_files import TOKEN_KINDS, TokenFiles, open_tokens

_WEIGHTED = re.compile(r"(?P<name>.+?)@(?P<weight>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)")
_BETWEEN = re.compile(r",\s*(?![^\[\]]*\])")
"""A comma that is not one of the characters that a pattern lists in brackets."""


def open_text(
    dataset: str | Path | Any,
    *,
    split: str | None = None,
    column: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    download: bool = False,
    dtype: str | None = None,
    separator: int | None = None,
) -> TextDataset:
    """Open a data set of documents; little more than its beginning is read.

    Args:
        dataset: ``"python-docs"``, the documentation that comes with Python (about half a million tokens of
            English, no download); a file: .txt (a document is what stands between blank lines), .jsonl, .json, .csv,
            .tsv, .parquet or .arrow, all but .parquet also with .gz or .zst behind; .npy or .bin of token ids; a folder
            or a glob pattern of such, hidden files left out, and runs, caches and saved SAEs; a folder that
            `datasets.save_to_disk` wrote, a clone of a repository of the hub, or one in its cache; a data set's name
            on the Hugging Face hub; or the texts themselves: a list, a data set of the library datasets, a function
            that returns an iterator, or an iterator, which is read once, into a temporary file. Texts may be strings,
            token ids, messages, or rows of columns. Several names, with commas between, are a mixture:
            ``"code.jsonl@0.7, prose@0.3"`` takes seven characters of the one to three of the other; see `mixed`.
        split: of a hub data set or repository, or of a folder whose files or folders are named after splits. None:
            train; all files where none is named so.
        column: that holds the text; token ids; or messages with their roles. Several of text, with commas between, are
            joined by a newline; behind one of token ids may stand the one that tells which of them make a row of
            activations. None: text, or where there is none the only one of input_ids, messages and conversations.
        subset: of a hub data set or repository, where it has several.
        revision: of a hub data set: a branch, a tag or a commit.
        download: a hub data set, in place of streaming it.
        dtype: of the token ids in a .bin that does not tell it, such as ``"uint16"``.
        separator: the id that stands between documents in a .npy or .bin. None: they are cut into pieces of at most
            8192 tokens.
    Raises:
        DataError: there is no such data, its kind is unknown, it is damaged or empty, or lacks the column.
        ConfigError: a setting means nothing for this kind of data, or a weight is no number above 0.
        MissingExtraError: a table, a .zst or a hub data set needs the extra `hf`.
    """
    asked = AskedText(split, column, subset, revision, download, dtype, separator)
    if isinstance(dataset, TextDataset):
        asked.refuse("a text that is open", *ALL)
        return dataset
    parts = _parts(dataset) if isinstance(dataset, str) else [(dataset, 1.0)]
    if len(parts) == 1:
        return _open(parts[0][0], asked)
    of_parts = [AskedText(**{**vars(asked), "refused": set()}) for _ in parts]
    text = mixed([(_open(name, each), weight) for (name, weight), each in zip(parts, of_parts)])
    asked.refuse("these texts", *set.intersection(*(each.refused or set() for each in of_parts)))
    return text


def _parts(dataset: str) -> list[tuple[str, float]]:
    """Return the names in a setting, with their weights: 1 where none is given."""
    if _exists(dataset):
        return [(dataset, 1.0)]
    parts = []
    for each in _BETWEEN.split(dataset):
        found = _WEIGHTED.fullmatch(each.strip())
        is_name = found is None or _exists(each.strip())
        parts.append((each.strip(), 1.0) if is_name or found is None else (found["name"], float(found["weight"])))
    if not all(name for name, _ in parts):
        raise ConfigError(f"dataset: expected names with commas between, got {dataset!r}.")
    return parts


def _exists(path: str) -> bool:
    try:
        return expand(path).exists()
    except ConfigError:  # none that there could be, as where many names are longer than one may be
        return False


def _open(dataset: Any, asked: AskedText) -> TextDataset:
    if isinstance(dataset, Path) or (isinstance(dataset, str) and _looks_local(dataset)):
        text = _from_files(expand(dataset, "dataset"), asked)
    elif isinstance(dataset, str) and dataset != PYTHON_DOCS:
        text = open_hub(dataset, asked)
    elif isinstance(dataset, str):
        asked.refuse("this text", *ALL)
        text = in_memory(f"{PYTHON_DOCS}:", python_docs(), "documents")
    else:
        text = open_object(dataset, asked)
    if text.first is None:
        raise DataError(f"{text.name} is empty: expected at least one document that is not blank.")
    return text


def _looks_local(dataset: str) -> bool:
    """Tell a path from a name on the hub, which is ``owner/name``, or of old a ``name`` without a suffix."""
    if dataset == PYTHON_DOCS:
        return False
    path = expand(dataset, "dataset")
    hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+|\w[\w-]*", dataset)
    return path.exists() or kind_of(path) in ALL_KINDS or not hub_name


def _from_files(path: Path, asked: AskedText) -> TextDataset:
    asked.refuse("a file or folder", *OF_HUB)
    where = snapshot_of(path) if path.is_dir() else path
    is_of_tokens = any(getattr(asked, name) is not None for name in OF_TOKENS)
    listed = files_in_card(where, asked.subset, asked.split) if where.is_dir() else None
    if listed is None:
        asked.refuse("a file or folder", "subset")
        listed = files_of_split(where, find_files(where, tokens=is_of_tokens), asked.split)
    files, of_split = listed
    size = sum(file.stat().st_size for file in files)
    what = f"{len(files)} file{'s' * (len(files) > 1)}{of_split}, {size} bytes"
    digest = files_digest(files, names=False)
    if all(kind_of(file) in TOKEN_KINDS for file in files):
        asked.refuse("files of token ids", "column")
        cut, read, in_any_order = _token_reader(files, asked)
    else:
        asked.refuse("files of text", *OF_TOKENS)
        cut, read, in_any_order = _text_reader(files, asked)
    name = f"{path.resolve()} ({what}{cut}, sha256 {digest})"
    kinds = [kind_of(file) for file in files if is_compressed(file)]  # which their suffixes do not tell

    def rows(start: int) -> Rows:
        return enumerate(read(start), start)

    return TextDataset(
        name,
        rows,
        lambda: text_digest([digest, cut, *kinds]),
        is_cut_at_blanks=all(kind_of(file) == ".txt" for file in files),
        in_any_order=in_any_order,
    )


_Reader: TypeAlias = tuple[str, Callable[[int], Iterator[Content]], Callable[[], Documents]]
"""How files are cut into documents, in words, what reads these from a number on, and what gives them in any order."""


def _text_reader(files: Sequence[Path], asked: AskedText) -> _Reader:
    columns = columns_of(files, asked.column)
    if columns is None:
        asked.refuse(".txt files", "column")
        columns, cut = Columns.of(None, ()), ", a document between blank lines"
    else:
        cut = f", {columns}"
    read = functools.partial(contents, files, columns)
    # any order goes by way of a temporary file, which is written when it is first needed
    return cut, read, functools.lru_cache(maxsize=1)(lambda: Spool(read(0)))


def _token_reader(files: Sequence[Path], asked: AskedText) -> _Reader:
    tokens = [open_tokens(file, asked.dtype, asked.separator) for file in files]
    kinds = ", ".join(dict.fromkeys(str(each.ids.dtype) for each in tokens))
    if asked.separator is not None and all(each.is_uncut for each in tokens):
        raise DataError(
            f"text_separator: {files[0]} holds no token {asked.separator}. Give the id that stands between its "
            "documents, mostly EOS, or leave the setting out."
        )
    between = "" if asked.separator is None else f" between {asked.separator}"
    joined = TokenFiles(tuple(tokens))
    return f", tokens of {kinds}{between}", joined.read, lambda: joined

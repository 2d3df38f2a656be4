"""Documents in local files: which files a path stands for, and how each kind is cut into documents."""

from __future__ import annotations

import functools
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flashsae.errors import ConfigError, DataError, FlashSAEError, require
from flashsae.settings.run import CONFIG_FILE
from flashsae.settings.toml import SEAL


def find_files(path: Path) -> list[Path]:
    """Return the files of text that a file, a folder or a glob pattern stands for, in the order of their names.

    Runs, caches and saved SAEs in folders below are left out: they are no text, and come and go.
    """
    known = ", ".join(READERS)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: cannot read a '{path.suffix}' file as text; expected one of {known}.")
        return [path]
    found = _visible(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    root = next(folder for folder in (path, *path.parents) if not glob.has_magic(str(folder)))
    is_ours = functools.cache(_is_ours)
    visible = (
        file
        for file in found
        if "__MACOSX" not in file.parts  # what that system adds to archives
        and not any(is_ours(folder) for folder in file.parents if root in folder.parents)
    )
    files = sorted(file for file in visible if file.is_file() and file.suffix.lower() in READERS)
    if not files:
        what = f"it holds no file ending in {known}" if path.is_dir() else "no such file, folder or match"
        raise DataError(f"text {str(path)!r}: {what}. Check the path (relative paths start at {Path.cwd()}).")
    return files


def _visible(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and no editor, notebook or system has hidden there: .git, .ipynb_checkpoints, ._x."""
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is a run, a cache of activations or a saved SAE, by the files that each of them has."""
    if (folder / "flashsae.json").is_file():
        return True
    log, settings, checkpoints = (folder / name for name in ("metrics.jsonl", CONFIG_FILE, "checkpoints"))
    if log.is_file() and (settings.is_file() or checkpoints.is_dir()):
        return True
    return _SETTINGS_BEGIN in _beginning(settings) or _INDEX_BEGINS in _beginning(folder / "index.json")


_SETTINGS_BEGIN, _INDEX_BEGINS = SEAL.encode(), b'"flashsae.activations"'


def _beginning(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(200)
    except OSError:
        return b""


_SPLITS = (
    frozenset({"train", "training"}),
    frozenset({"validation", "valid", "val", "dev"}),
    frozenset({"test", "testing", "eval", "evaluation"}),
)
"""Words that name the same split."""


def files_of_split(path: Path, files: list[Path], split: str | None) -> tuple[list[Path], str]:
    """Return those files that belong to a split by their names or folders, such as test-00000.parquet, and a remark.

    Args:
        path: what the files were found under.
        files: in order.
        split: None: that of training where several splits are named so, else all files.
    Raises:
        ConfigError: a split is asked for and no file is named after it.
    """
    names = {file: _words(file if file == path or not path.is_dir() else file.relative_to(path)) for file in files}
    asked = (split or "train").lower()
    wanted = next((words for words in _SPLITS if asked in words), frozenset({asked}))
    chosen = [file for file in files if names[file] & wanted]
    if split is None:
        others = frozenset().union(*_SPLITS) - wanted
        if not path.is_dir() or not chosen or not any(names[file] & others for file in files):
            return files, ""
    if not chosen:
        raise ConfigError(
            f"text_split: no file of {path} is named after the split {split!r}. Name the files or folder of that split "
            "as the text, or leave the setting out."
        )
    return chosen, f" of split {split or 'train'!r}"


def _words(path: Path) -> set[str]:
    """Return the words in the name of a file and of its folders."""
    own = path.parts if not path.is_absolute() else path.parts[-1:]
    return {word for part in own for word in re.split(r"[^a-z]+", part.lower()) if word}


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
        with open(file, encoding="utf-8-sig") as stream:  # some editors begin a file with a byte order mark
            yield from enumerate(stream, start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}. Check the file and its permissions.") from error


def _read_json_lines(file: Path, column: str) -> Iterator[str]:
    for number, line in _lines(file):
        if line.strip():
            yield field_of(_parse(line, f"{file}, line {number}"), column, f"{file}, line {number}")


def _read_json(file: Path, column: str) -> Iterator[str]:
    """Read one JSON list of objects or strings; a file that starts otherwise holds JSON lines."""
    first = next((line.lstrip() for _, line in _lines(file) if line.strip()), "")
    if not first.startswith("["):
        yield from _read_json_lines(file, column)
        return
    rows = _parse("".join(line for _, line in _lines(file)), str(file))
    for number, row in enumerate(rows):
        yield row if isinstance(row, str) else field_of(row, column, f"{file}, entry {number}")


def _parse(source: str, where: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
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
        raise DataError(f"{file} is no parquet file, or a damaged one: {first_line(error)}") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def field_of(row: Any, column: str, where: str) -> str:
    """Return the text in a row of a data set; an absent value is an empty text. Raises DataError naming `where`."""
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


def first_line(error: Exception) -> str:
    """Return what an error of somebody else's says first, as a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".") + "."

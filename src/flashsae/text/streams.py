"""Bytes and lines of files, whatever they are compressed with and however they are encoded."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from flashsae.errors import DataError, first_line, require

COMPRESSIONS = (".gz", ".zst")
"""Suffixes that may stand behind the one that tells what a file holds."""
LONGEST = 1 << 28
"""Characters of a document; what unpacks to more than this without an end is no text."""
_MARKS = {  # the longer before the one that it begins with
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ESCAPED, _REPLACED = re.compile("[\udc80-\udcff]"), re.compile("\ufffd")


def kind_of(file: Path) -> str:
    """Return the suffix that tells what a file holds, in lower case: ".jsonl" of x.jsonl and x.jsonl.gz."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def is_compressed(file: Path) -> bool:
    """Tell whether a file is compressed as a whole."""
    return file.suffix.lower() in COMPRESSIONS


def open_bytes(file: Path) -> io.BufferedReader:
    """Open a file for its bytes as they were before it was compressed.

    Raises:
        MissingExtraError: a .zst needs the extra `hf`.
    """
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(file)))
    if suffix == ".zst":
        arrow = require("pyarrow", "hf")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd"))
    return open(file, "rb")


def encoding_of(stream: io.BufferedReader) -> str:
    """Return the encoding that the first bytes of a stream tell: UTF-8 where there is no byte order mark."""
    head = stream.peek(4)
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")


@contextmanager
def open_text_of(file: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file for its characters.

    Raises:
        DataError: the file cannot be read, is damaged, or has a byte that is none of its encoding.
    """
    encoding = "utf-8-sig"
    try:
        with open_bytes(file) as stream:
            encoding = encoding_of(stream)
            with _as_text(stream, encoding) as text:
                yield text
    except UnicodeDecodeError as error:
        raise wrong_byte(file, encoding, error.reason) from error
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) from 1 on, each with its line break.

    Raises:
        DataError: see `open_text_of`; or a line is longer than any document.
    """
    with open_text_of(file) as text:
        number = 0
        while line := text.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise too_long(f"{file}, line {number}")
            yield number, line


def chunks(file: Path, characters: int) -> Iterator[str]:
    """Yield the text of a file, so many characters at a time."""
    with open_text_of(file) as text:
        while chunk := text.read(characters):
            yield chunk


def _as_text(stream: io.BufferedReader, encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(cast(IO[bytes], stream), encoding=encoding, errors=errors)


def too_long(where: str) -> DataError:
    """Return the error of a document that has no end."""
    return DataError(
        f"{where}: it is longer than {LONGEST:,} characters, which no document is. Cut it into documents, or take it "
        "out."
    )


def unreadable(file: Path, error: Exception) -> DataError:
    """Return the error of a file that the system does not give, or that is not what its name says."""
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"cannot read {file}: {error.strerror}. Check the file and its permissions.")
    return DataError(f"{file} is damaged, cut short, or not what its name says: {first_line(error)} Get it anew.")


def wrong_byte(file: Path, encoding: str = "utf-8-sig", reason: str = "invalid bytes") -> DataError:
    """Return the error of a file with a byte that is none of its encoding; finds the line.

    Args:
        file: where it is.
        encoding: of the file.
        reason: as the decoder tells it.
    """
    is_utf8 = encoding == "utf-8-sig"
    sign = _ESCAPED if is_utf8 else _REPLACED
    with open_bytes(file) as stream, _as_text(stream, encoding, "surrogateescape" if is_utf8 else "replace") as text:
        number = next((number for number, line in enumerate(text, 1) if sign.search(line)), None)
    where = f"{file}, line {number}: it" if number else f"{file}"
    name = "UTF-8" if is_utf8 else encoding.upper()
    return DataError(f"{where} is not {name} text ({reason}); convert the file to UTF-8.")

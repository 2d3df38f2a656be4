"""Documents in files of text: paragraphs of .txt, objects of .jsonl and .json.

A reader skips `start` documents, yields the others, and returns how many there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from flashsae.errors import DataError
from flashsae.text.columns import Columns
from flashsae.text.content import Content
from flashsae.text.streams import LONGEST, chunks, lines, too_long

Documents: TypeAlias = Generator[Content, None, int]
"""Of a file from some number on; returns how many the file has."""


def read_txt(file: Path, columns: Columns, start: int) -> Documents:
    """Read what stands between blank lines."""
    number = 0
    for number, paragraph in enumerate(_paragraphs(file), start=1):
        if number > start:
            yield paragraph
    return number


def _paragraphs(file: Path) -> Iterator[str]:
    paragraph: list[str] = []
    room = LONGEST
    for number, line in lines(file):
        if line.strip():
            paragraph.append(line)
            room -= len(line)
            if room < 0:
                raise too_long(f"{file}, line {number}")
        elif paragraph:
            yield "".join(paragraph).strip("\n")
            paragraph, room = [], LONGEST
    if paragraph:
        yield "".join(paragraph).strip("\n")


def read_json_lines(file: Path, columns: Columns, start: int) -> Documents:
    """Read an object a line."""
    number = 0
    for place, line in lines(file):
        if line.strip():
            number += 1
            if number > start:
                where = f"{file}, line {place}"
                yield columns.content(_parsed(line, where), where)
    return number


def read_json(file: Path, columns: Columns, start: int) -> Documents:
    """Read one JSON list of objects or strings; a file that starts otherwise holds JSON lines."""
    if not _is_list(file):
        return (yield from read_json_lines(file, columns, start))
    number = 0
    for entry in _entries(file):
        number += 1
        if number > start:
            yield entry if isinstance(entry, str) else columns.content(entry, f"{file}, entry {number - 1}")
    return number


def names_in_json(file: Path) -> list[str] | None:
    """Return the fields of the first object of a file; None where it begins with no object."""
    if _is_list(file):
        first = next(_entries(file), None)
    else:
        place, line = next(((place, line) for place, line in lines(file) if line.strip()), (0, "null"))
        first = _parsed(line, f"{file}, line {place}")
    return list(first) if isinstance(first, dict) else None


def _is_list(file: Path) -> bool:
    return next((chunk.lstrip() for chunk in chunks(file, _CHUNK) if chunk.strip()), "").startswith("[")


def _parsed(source: str, where: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: object) -> DataError:
    return DataError(f"{where} is not JSON ({error}); repair it or take it out.")


def _entries(file: Path) -> Iterator[Any]:
    """Yield the entries of one JSON list, with no more of it in memory than its longest entry takes."""
    text = _Json(file)
    text.take("[")
    while text.next() != "]":
        yield text.entry()
        if text.next() != "]":
            text.take(",")
            if text.next() == "]":
                raise text.error("expected an entry behind the last comma")
    text.take("]")
    if text.next():
        raise text.error(f"expected nothing behind the list, got {text.next()!r}")


class _Json:
    """JSON that is read on as it is needed."""

    def __init__(self, file: Path) -> None:
        self._file, self._chunks = file, chunks(file, _CHUNK)
        self._text, self._place = "", 0

    def error(self, what: object) -> DataError:
        return _not_json(str(self._file), what)

    def next(self) -> str:
        """Return the next character behind white space; "" at the end."""
        while True:
            self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]  # matches always
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]

    def take(self, character: str) -> None:
        if self.next() != character:
            raise self.error(f"expected {character!r}, got {self.next() or 'the end of the file'!r}")
        self._place += 1

    def entry(self) -> Any:
        self.next()
        while True:
            try:
                entry, end = _DECODER.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                if not self._is_cut(error) or not self._read_on():
                    raise self.error(error) from error
                continue
            if end < len(self._text) or not self._read_on():  # a number at the end may go on
                self._place = end
                return entry

    def _is_cut(self, error: Exception) -> bool:
        """Tell whether an entry may only be cut short by the end of what was read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - len(r"\ud800\udc00")

    def _read_on(self) -> bool:
        """Read at least as much as is left, so that the parts of a long entry are not parsed again and again."""
        rest = self._text[self._place :]
        if len(rest) > LONGEST:
            raise too_long(str(self._file))
        more = "".join(islice(self._chunks, 1 + len(rest) // _CHUNK))
        self._text, self._place = rest + more, 0
        return bool(more)


_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

"""Documents in a temporary file: to be read in any order, or again, where their source gives them once and in its own.

The file is in the folder that the system has for such (TMPDIR) and is gone with the process.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from flashsae.errors import StorageError
from flashsae.text.content import Chat, Content, Tokens

_OFFSET = 8
"""Bytes of the place of a document."""


class Spool:
    """What an iterator gives, kept so that each document can be read again at its number.

    Args:
        documents: read on as far as it is asked for; never twice.
    """

    def __init__(self, documents: Iterator[Content]) -> None:
        self._documents = documents
        self._lock = threading.RLock()
        self._text: IO[bytes] | None = None
        self._places: IO[bytes] | None = None
        self._written, self._end = 0, 0
        self._is_complete = False

    def __len__(self) -> int:
        """Return how many documents there are; the iterator is read to its end for it."""
        with self._lock:
            while self._read_on():
                pass
            return self._written

    def __getitem__(self, place: int) -> Content:
        """Return a document; IndexError where there is none."""
        with self._lock:
            while place >= self._written:
                if not self._read_on():
                    raise IndexError(place)
            return self._read(place)

    def rows(self, start: int) -> Iterator[tuple[int, Content]]:
        """Yield the documents from a number on."""
        while True:
            try:
                content = self[start]
            except IndexError:
                return
            yield start, content
            start += 1

    def _read_on(self) -> bool:
        if self._is_complete:
            return False
        content = next(self._documents, None)
        if content is None:
            self._is_complete = True
            return False
        try:
            if self._text is None or self._places is None:
                self._text, self._places = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - stay open
                for opened in (self._text, self._places):
                    weakref.finalize(self, opened.close)
            for stream, data in ((self._places, self._end.to_bytes(_OFFSET, "little")), (self._text, packed(content))):
                stream.seek(0, 2)
                stream.write(data)
            self._end += len(data)
        except OSError as error:
            raise StorageError(
                f"documents are copied to a temporary file in {tempfile.gettempdir()}, which the system refuses after "
                f"{self._end:,} bytes: {error.strerror}. Make room there, or name another folder in TMPDIR."
            ) from error
        self._written += 1
        return True

    def _read(self, place: int) -> Content:
        assert self._text is not None
        assert self._places is not None
        self._places.seek(place * _OFFSET)
        bounds = self._places.read(2 * _OFFSET)
        begin = int.from_bytes(bounds[:_OFFSET], "little")
        end = int.from_bytes(bounds[_OFFSET:], "little") if len(bounds) > _OFFSET else self._end
        self._text.seek(begin)
        return unpacked(self._text.read(end - begin))


def packed(content: Content) -> bytes:
    """Return a document as bytes."""
    if isinstance(content, str):
        return b"s" + content.encode("utf-8", "surrogatepass")
    if isinstance(content, Chat):
        return b"c" + json.dumps(list(content.messages), default=str).encode()
    mask = b"" if content.keep is None else content.keep.tobytes()
    return b"t" + len(mask).to_bytes(_OFFSET, "little") + mask + content.ids.astype("<i8").tobytes()


def unpacked(data: bytes) -> Content:
    """Return the document that `packed` made bytes of."""
    kind, rest = data[:1], data[1:]
    if kind == b"s":
        return rest.decode("utf-8", "surrogatepass")
    if kind == b"c":
        return Chat(json.loads(rest))
    masked, rest = int.from_bytes(rest[:_OFFSET], "little"), rest[_OFFSET:]
    keep: Any = np.frombuffer(rest[:masked], bool) if masked else None
    return Tokens(np.frombuffer(rest[masked:], "<i8"), keep)

"""Documents that are kept come back as they were, in any order, from whatever was read of them so far."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flashsae.errors import StorageError
from flashsae.text.content import Chat, Content, Tokens
from flashsae.text.spool import Spool

DOCUMENTS: list[Content] = [
    "a",
    "",
    "δ \ud800",
    Tokens([1, 2**31 - 1]),
    Tokens([1, 2, 3], [0, 1, 0]),
    Tokens([]),
    Chat([{"role": "user", "content": "hi", "tools": [{"n": 1}]}]),
    "last\n",
]


def test_documents_come_back_as_they_were() -> None:
    spool = Spool(iter(DOCUMENTS))
    assert spool[3] == DOCUMENTS[3]
    assert [content for _, content in spool.rows(2)] == DOCUMENTS[2:]
    assert len(spool) == len(DOCUMENTS)
    assert [spool[i] for i in (7, 0, 5, 2)] == [DOCUMENTS[i] for i in (7, 0, 5, 2)]
    assert list(spool.rows(8)) == []
    with pytest.raises(IndexError):
        spool[8]


def test_no_more_is_read_than_asked_for_and_nothing_twice() -> None:
    taken: list[int] = []

    def documents() -> Iterator[Content]:
        for i in range(1000):
            taken.append(i)
            yield str(i)

    spool = Spool(documents())
    rows = spool.rows(0)
    assert [next(rows) for _ in range(3)] == [(0, "0"), (1, "1"), (2, "2")]
    assert taken == [0, 1, 2]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: [content for _, content in spool.rows(0)], range(4)))
    assert results == [[str(i) for i in range(1000)]] * 4
    assert taken == list(range(1000))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError, match=r"No space left on device\. Make room there, or name another folder"):
        Spool(iter(["a"]))[0]

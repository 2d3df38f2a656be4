"""Forwards that run ahead of what is handed out give the same chunks and cursors."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import Chunk, Cursor
from flashsae.lm.apart import WindowsApart


def read(
    source: LanguageModelSource, max_tokens: int | None, cursor: Cursor | None = None
) -> list[tuple[Chunk, Cursor]]:
    return list(source.chunks(None, cursor, max_tokens))


@pytest.mark.parametrize("ratio", [None, 1.05])
def test_running_ahead_changes_nothing(tiny: ModuleType, ratio: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = tiny.source(replace(tiny.CACHED, max_norm_ratio=ratio))
    whole = read(reader, None)
    total = sum(len(chunk.group) for chunk, _ in whole)
    assert len(whole) > 8
    assert whole[-1][1]["dropped"] > 0 or ratio is None
    limits = (None, 1, total // 3, total // 3 + 1, total - 1, total, total + 1)
    expected = {limit: read(reader, limit) for limit in limits}
    monkeypatch.setattr(reader, "_most_ahead", 2)
    for limit, chunks in expected.items():
        found = read(reader, limit)
        assert [cursor for _, cursor in found] == [cursor for _, cursor in chunks]
        assert all(tiny.same(a, b) for (a, _), (b, _) in zip(found, chunks))
        for place in (0, len(chunks) // 2):
            rest = read(reader, limit, chunks[place][1])
            assert [cursor for _, cursor in rest] == [cursor for _, cursor in chunks[place + 1 :]]
            assert all(tiny.same(a, b) for (a, _), (b, _) in zip(rest, chunks[place + 1 :]))


def test_the_next_forward_is_launched_before_one_is_handed_out(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = tiny.source(tiny.CACHED)
    launched = []
    launch = reader._forwards.launch
    monkeypatch.setattr(reader._forwards, "launch", lambda *read: launched.append(read) or launch(*read))
    monkeypatch.setattr(reader, "_most_ahead", 1)
    chunks = reader.chunks(None)
    next(chunks)
    assert len(launched) == 2
    next(chunks)
    assert len(launched) == 3


@pytest.mark.parametrize("processes", [1, 3])
def test_windows_of_other_processes_are_read_alike(
    tiny: ModuleType, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = tiny.source(tiny.CACHED)
    expected = read(reader, None)
    monkeypatch.setattr(reader, "_cutter", WindowsApart(reader._windows, processes))
    found = read(reader, None)
    assert [cursor for _, cursor in found] == [cursor for _, cursor in expected]
    assert all(tiny.same(a, b) for (a, _), (b, _) in zip(found, expected))

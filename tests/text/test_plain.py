"""A list of JSON is read entry by entry, wherever what was read so far ends; and every mistake in it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashsae.errors import DataError
from flashsae.text import plain
from flashsae.text.columns import Columns
from flashsae.text.plain import Documents, names_in_json, read_json, read_json_lines, read_txt

TEXT = Columns(("text",))
ENTRIES = [
    "a",
    {"text": 'b ] , " \\ é 😀'},
    "",
    {"text": None, "n": 12.5e3},
    {"text": "c" * 50, "deep": [[1], {}]},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii", [True, False])
def test_a_list_is_read_entry_by_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, ascii: bool
) -> None:
    monkeypatch.setattr(plain, "_CHUNK", chunk)
    file = tmp_path / "x.json"
    file.write_text(" \n" + json.dumps(ENTRIES, indent=indent, ensure_ascii=ascii) + "\n ", "utf-8", "surrogatepass")
    expected = [entry if isinstance(entry, str) else entry["text"] or "" for entry in ENTRIES]
    assert list(read_json(file, TEXT, 0)) == expected
    assert list(read_json(file, TEXT, 3)) == expected[3:]
    file.write_text("[]")
    assert list(read_json(file, TEXT, 0)) == []


def test_a_long_list_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_CHUNK", 100)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(["x" * 30] * 1000))
    sizes = []
    decode = plain._DECODER.raw_decode

    class Watched:
        def raw_decode(self, text: str, place: int) -> object:
            sizes.append(len(text))
            return decode(text, place)

    monkeypatch.setattr(plain, "_DECODER", Watched())
    assert len(list(read_json(file, TEXT, 0))) == 1000
    assert max(sizes) <= 300


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a", ', "is not JSON"),
        ('["a"', "got 'the end of the file'"),
        ('["a" "b"]', "expected ',', got '\"'"),
        ('["a",]', "expected an entry behind the last comma"),
        ('["a", "b"', "expected ',', got 'the end of the file'"),
        ('["a", {"text": tru}]', "is not JSON"),
        ('["a", "b', "Unterminated string"),
        ('["a"] x', "expected nothing behind the list, got 'x'"),
        ('["a"]["b"]', "expected nothing behind the list"),
        ('["a", 3]', "entry 1: expected an object with the field 'text', got int"),
        ("[" * 20_000, "is not JSON"),
    ],
)
def test_a_wrong_list_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, content: str, message: str
) -> None:
    monkeypatch.setattr(plain, "_CHUNK", chunk if len(content) < 1000 else 1 << 20)
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=rf"x\.json.*{message}"):
        list(read_json(tmp_path / "x.json", TEXT, 0))


def counted(reader: Documents, into: list[object]) -> Iterator[object]:
    into.append((yield from reader))


def test_readers_skip_and_return_how_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\n\nb\n\n\nc")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\nnot looked at\n{"text": "c"}\n')
    (tmp_path / "x.json").write_text('["a", 3, "c"]')
    for name, read in (("x.txt", read_txt), ("x.jsonl", read_json_lines), ("x.json", read_json)):
        for start, expected in ((2, ["c"]), (3, []), (9, [])):
            counts: list[object] = []
            assert list(counted(read(tmp_path / name, TEXT, start), counts)) == expected
            assert counts == [3]


def test_the_fields_are_those_of_the_first_object(tmp_path: Path) -> None:
    for content, names in (
        ('{"a": 1, "b": 2}\n{"c": 1}', ["a", "b"]),
        ('[{"a": 1}]', ["a"]),
        ('["text"]', None),
        ("[]", None),
        ("\n", None),
    ):
        (tmp_path / "x.json").write_text(content)
        assert names_in_json(tmp_path / "x.json") == names

"""The documents of every kind of data set, the numbers they go by, and what is said where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashsae.errors import DataError
from flashsae.text.open import open_text

DOCUMENTS = ["alpha one", "beta two\nbeta three", "gamma", "δelta"]


def write_txt(path: Path) -> None:
    path.write_text("\n\n" + "\n \n\n".join(DOCUMENTS) + "\n\n\n", "utf-8")


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"id": 1, "text": document}) for document in DOCUMENTS), "utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": document} for document in DOCUMENTS], indent=1), "utf-8")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "id": [1, 2, 3, 4]}), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.txt": write_txt,
    "a.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "a.json": write_json,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_give_their_documents_from_any_number_on(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    for where in (tmp_path / name, str(tmp_path / name), tmp_path, str(tmp_path / "*")):
        text = open_text(where)
        assert list(text.documents()) == DOCUMENTS
        assert list(text.documents(2)) == DOCUMENTS[2:]
        assert list(text.documents(99)) == []


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b1\n\nb2")
    (tmp_path / "a.txt").write_text("a1")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c1"}')
    (tmp_path / "notes.md").write_text("not text to train on")
    text = open_text(tmp_path)
    assert list(text.numbered()) == [(0, "a1"), (1, "b1"), (2, "b2"), (3, "c1")]
    assert list(text.numbered(2)) == [(2, "b2"), (3, "c1")]


def test_blank_documents_are_left_out_with_their_numbers(tmp_path: Path) -> None:
    assert list(open_text(["", "a", " \n", "b"]).numbered()) == [(1, "a"), (3, "b")]
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": null}\n{"text": "a"}\n\n{"text": ""}\n{"text": "b"}\n')
    assert list(open_text(path).numbered()) == [(1, "a"), (3, "b")]
    assert list(open_text(path).numbered(2)) == [(3, "b")]


def test_another_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "a", "text": "b"}')
    assert list(open_text(path, column="body").documents()) == ["a"]
    assert open_text(path, column="body").name != open_text(path).name


def test_names_tell_contents_apart(tmp_path: Path) -> None:
    assert open_text(["a", "b"]).name == open_text(("a", "b")).name
    assert open_text(["a", "bc"]).name != open_text(["ab", "c"]).name
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo")
    before = open_text(path).name
    assert str(path) in before
    assert open_text(path).name == before
    path.write_text("one\n\ntoo")
    assert open_text(path).name != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2 is not JSON"),
        ("late.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"line 2: there is no column 'text'; it has 'txt'"),
        ("number.jsonl", b'{"text": 3}', r"line 1: column 'text' should hold text, token ids or messages, got int"),
        ("plain.jsonl", b"[1]", r"line 1: expected an object with the field 'text', got list"),
        ("empty.txt", b"\n \n\n", r"is empty: expected at least one document"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin\.txt, line 1: it is not UTF-8"),
        ("x.md", b"a,b", r"cannot read a '\.md' file as text; expected one of \.txt"),
        ("x.parquet", b"PAR1 nothing PAR1", r"x\.parquet is no parquet file, or a damaged one"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_text(tmp_path / name).documents())


def test_a_missing_parquet_column_names_those_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'body'; it has 'text', 'id'"):
        open_text(tmp_path / "a.parquet", column="body")


@pytest.mark.parametrize("dataset", ["nowhere.txt", "some/deep/folder", "./here", "table.csv", "*.jsonl", "/x"])
def test_a_missing_file_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        open_text(dataset)


def test_an_empty_folder_and_wrong_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file ending in \.txt, \.jsonl"):
        open_text(tmp_path)
    with pytest.raises(DataError, match="got int at index 1"):
        open_text(["a", 3])
    for wrong in (3, {"a": 1}, {"a"}, b"bytes", None):
        with pytest.raises(DataError, match=f"text: expected a name, .* got {type(wrong).__name__}"):
            open_text(wrong)
    with pytest.raises(DataError, match="is empty"):
        open_text([])

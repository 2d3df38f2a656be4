"""Tables of every kind and compression: text as it stands there, skipped rows not read, damage in one sentence."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from flashsae.errors import DataError, FlashSAEError
from flashsae.text import tables
from flashsae.text.content import Chat, Tokens
from flashsae.text.open import open_text
from helpers.packers import PACKERS

TEXTS = ["1", 'two,\n"three"', "", "NA", "null", "δ; four"]


def write_parquet(table: Any, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def write_arrow(table: Any, path: Path, kind: str = "file") -> None:
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "x.csv": pyarrow.csv.write_csv,
    "x.tsv": lambda table, path: pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter="\t")),
    "x.parquet": write_parquet,
    "x.arrow": write_arrow,
    "stream.arrow": lambda table, path: write_arrow(table, path, "stream"),
}


def test_all_kinds_and_compressions_give_the_same_documents(tmp_path: Path) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    expected = [(i, text) for i, text in enumerate(TEXTS) if text]
    for name, write in WRITERS.items():
        write(table, tmp_path / name)
        for suffix, pack in PACKERS.items():
            if name == "x.parquet" and suffix:
                continue
            file = tmp_path / f"{name}{suffix}"
            file.write_bytes(pack((tmp_path / name).read_bytes()))
            text = open_text(file)
            assert list(text.numbered()) == expected, file
            for start in range(len(TEXTS) + 2):
                assert list(text.numbered(start)) == [row for row in expected if row[0] >= start], file
            assert "column 'text'" in text.name


def test_rows_that_are_skipped_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    values = tables._values
    monkeypatch.setattr(tables, "_values", lambda column: (read.append(len(column)), values(column))[1])
    table = pyarrow.table({"text": [str(i) for i in range(20)]})
    for name in ("x.parquet", "x.arrow", "stream.arrow"):
        WRITERS[name](table, tmp_path / name)
        text = open_text(tmp_path / name)
        read.clear()
        assert list(text.documents(17)) == ["17", "18", "19"]
        assert sum(read) == 3
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    folder = open_text(tmp_path / "*.parquet")
    monkeypatch.setattr(tables, "_values", lambda column: pytest.fail("read") if len(column) == 20 else values(column))
    assert list(folder.documents(37)) == ["17", "18", "19"]


def test_row_groups_that_are_skipped_may_be_anything(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"text {i}" for i in range(8)]}), tmp_path / "x.parquet", row_group_size=4
    )
    text = open_text(tmp_path / "x.parquet")
    damaged = bytearray((tmp_path / "x.parquet").read_bytes())
    damaged[4:40] = bytes(36)
    (tmp_path / "x.parquet").write_bytes(damaged)
    assert list(text.documents(5)) == ["text 5", "text 6", "text 7"]
    with pytest.raises(DataError, match="damaged"):
        list(text.documents(3))


def test_offsets_that_point_elsewhere_are_damage(tmp_path: Path) -> None:
    write_arrow(pyarrow.table({"text": ["12345678"] * 4}), tmp_path / "x.arrow", "stream")
    whole = (tmp_path / "x.arrow").read_bytes()
    offsets = np.arange(0, 40, 8, dtype=np.int32)
    assert whole.count(offsets.tobytes()) == 1
    for wrong in ([0, 8, 16, 24, 500], [0, 8, 4, 24, 32], [-8, 8, 16, 24, 32]):
        (tmp_path / "x.arrow").write_bytes(whole.replace(offsets.tobytes(), np.array(wrong, np.int32).tobytes()))
        with pytest.raises(DataError, match="is no arrow file, or a damaged one"):
            open_text(tmp_path / "x.arrow")


def test_a_folder_of_all_kinds_is_read_in_order(tmp_path: Path) -> None:
    for i, (name, write) in enumerate(WRITERS.items()):
        write(pyarrow.table({"text": [f"{i}a", f"{i}b"]}), tmp_path / f"{i}{name}")
    (tmp_path / "5.txt.gz").write_bytes(PACKERS[".gz"](b"5a\n\n5b"))
    (tmp_path / "6.jsonl.zst").write_bytes(PACKERS[".zst"](b'{"text": "6a"}\n{"text": "6b"}'))
    (tmp_path / "0x.csv.gz").write_bytes(PACKERS[".gz"]((tmp_path / "0x.csv").read_bytes()))  # a copy of the same
    (tmp_path / "6.jsonl.gz").write_bytes(PACKERS[".gz"](b'{"text": "6a"}\n{"text": "6b"}'))
    expected = [f"{i}{letter}" for i in range(7) for letter in "ab"]
    for where in (tmp_path, str(tmp_path / "*")):
        assert list(open_text(where).documents()) == expected
        assert list(open_text(where).documents(5)) == expected[5:]


def test_types_of_arrow_are_texts_tokens_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    columns = {
        "large": pyarrow.array(["a", None], pyarrow.large_string()),
        "words": pyarrow.array(["a", "b"]).dictionary_encode(),
        "ids": pyarrow.array([[1, 2], [3]], pyarrow.list_(pyarrow.uint16())),
        "many": pyarrow.array([[1, 2], None], pyarrow.large_list(pyarrow.int64())),
        "fixed": pyarrow.array([[1, 2], [3, 4]], pyarrow.list_(pyarrow.int32(), 2)),
        "holes": pyarrow.array([[1, None], [3, 4]]),
        "chat": pyarrow.array([chat, chat]),
    }
    expected: dict[str, list[Any]] = {
        "large": ["a"],
        "words": ["a", "b"],
        "ids": [Tokens([1, 2]), Tokens([3])],
        "many": [Tokens([1, 2])],
        "fixed": [Tokens([1, 2]), Tokens([3, 4])],
        "chat": [Chat(chat), Chat(chat)],
    }
    for name in ("x.parquet", "x.arrow"):
        WRITERS[name](pyarrow.table(columns), tmp_path / name)
        for column, documents in expected.items():
            assert list(open_text(tmp_path / name, column=column).documents()) == documents, (name, column)
        with pytest.raises(DataError, match="row 0: column 'holes': expected a flat list of token ids"):
            open_text(tmp_path / name, column="holes")
    first = next(open_text(tmp_path / "x.arrow", column="ids").documents())
    assert isinstance(first, Tokens)
    assert first.ids.dtype == np.uint16


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text;label\na, b;1\n", ["a, b"]),
        (b"text\tlabel\na, b\t1\n", ["a, b"]),
        (b"\xef\xbb\xbftext,label\r\na,1\r\nb,2", ["a", "b"]),
        ("text,label\nα,1\n".encode("utf-16"), ["α"]),
        (b"label,text\ncaf\xe9,b\n", ["b"]),  # what is not read may be anything
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert list(open_text(tmp_path / "x.csv").documents()) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty: expected at least one document"),
        ("x.csv", b"text,id\n", "is empty: expected at least one document"),
        ("x.csv", b"id,body\n1,a\n", "there is no column 'text'; it has 'id', 'body'"),
        (
            "x.csv",
            b"text,id\na,1\nb,2,3\n",
            "no table of the rows that its first line names: .*Row #3: Expected 2 columns",
        ),
        ("x.csv", b'text,id\n"a,1\nb,2\n', "no table of the rows that its first line names"),
        ("x.csv", b"text,id\na,1\ncaf\xe9,2\n", r"x\.csv, line 3: it is not UTF-8"),
        ("x.csv", b"text,text\na,b\n", "it has the column 'text' 2 times. Give each its own name"),
        ("x.csv.gz", PACKERS[".gz"](b"text\na")[:-9], "is damaged, cut short"),
        ("x.parquet", b"", "is no parquet file, or a damaged one"),
        ("x.arrow", b"", "is no arrow file, or a damaged one"),
        ("x.arrow", b"not arrow at all", "is no arrow file, or a damaged one"),
        ("x.parquet.gz", b"", r"a \.parquet file cannot be read while it is compressed; unpack it first"),
    ],
)
def test_a_wrong_table_is_told_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_text(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "stream.arrow"])
def test_a_table_that_is_cut_short_is_told(tmp_path: Path, name: str) -> None:
    WRITERS[name](pyarrow.table({"text": ["x" * 1000] * 20}), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (len(whole) - 3 if name != "stream.arrow" else len(whole) * 2 // 3, len(whole) // 2, 100):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{name}.* (damaged|cut short)"):
            list(open_text(tmp_path / name).documents())


def test_a_row_without_an_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_CSV_BLOCK", 1 << 20)
    (tmp_path / "x.csv").write_bytes(b'text\n"' + b"a" * (3 << 20) + b'"\n')
    with pytest.raises(
        DataError, match=r"x\.csv has a row of more than 1 MB, or a quotation mark that is never closed"
    ):
        list(open_text(tmp_path / "x.csv").documents())


def test_a_changed_byte_is_never_more_than_one_sentence(tmp_path: Path) -> None:
    """Either the documents are others, or the file is refused; offsets into memory that there is not end nothing."""
    table = pyarrow.table({"text": [f"document {i}" for i in range(12)], "input_ids": [[1, 2, 3]] * 12})
    for name in ("x.parquet", "x.arrow", "stream.arrow"):
        WRITERS[name](table, tmp_path / name)
    pyarrow.csv.write_csv(table.select(["text"]), tmp_path / "x.csv")
    np.save(tmp_path / "x.npy", np.arange(64, dtype=np.uint16))
    draws, refused = random.Random(0), 0
    for name in ("x.parquet", "x.arrow", "stream.arrow", "x.csv", "x.npy"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(40):
            changed = bytearray(whole)
            changed[draws.randrange(len(whole) if name != "x.npy" else 128)] = draws.randrange(256)
            (tmp_path / name).write_bytes(changed)
            column = draws.choice([None, "input_ids"]) if name in WRITERS and name != "x.csv" else None
            try:
                list(open_text(tmp_path / name, column=column).documents())
            except FlashSAEError as error:
                refused += 1
                assert "\n" not in str(error)  # noqa: PT017 - either is right
    assert 40 < refused < 200

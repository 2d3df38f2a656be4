"""Compressed and encoded files give the lines that were written, and damaged ones one sentence with the line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from flashsae.errors import DataError, MissingExtraError
from flashsae.text import streams
from flashsae.text.open import open_text
from flashsae.text.streams import chunks, kind_of, lines
from helpers.packers import PACKERS

TEXT = "one\r\ntwo δ\n\nthree"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_are_those_that_were_written(tmp_path: Path, suffix: str, encoding: str) -> None:
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(PACKERS[suffix](TEXT.encode(encoding)))
    assert list(lines(file)) == [(1, "one\n"), (2, "two δ\n"), (3, "\n"), (4, "three")]
    assert "".join(chunks(file, 3)) == TEXT.replace("\r", "")
    assert kind_of(file) == ".txt"


@pytest.mark.parametrize("order", ["le", "be"])
def test_both_orders_of_bytes_are_known_by_their_marks(tmp_path: Path, order: str) -> None:
    (tmp_path / "x.txt").write_bytes(f"\ufeff{TEXT}".encode(f"utf-16-{order}"))
    assert [line for _, line in lines(tmp_path / "x.txt")] == ["one\n", "two δ\n", "\n", "three"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_archives_in_one_file_are_read_one_behind_the_other(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](b'{"text": "a"}\n') + PACKERS[suffix](b'{"text": "b"}\n'))
    assert list(open_text(file).documents()) == ["a", "b"]


@pytest.mark.parametrize(
    ("suffix", "damage"), [*((s, d) for s in (".gz", ".zst") for d in ("cut", "other")), (".gz", "changed")]
)
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = PACKERS[suffix](b"".join(b"a line %d\n\n" % (i * i) for i in range(5000)))
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes({"cut": whole[: len(whole) // 2], "other": b"plain text", "changed": bytes(changed)}[damage])
    with pytest.raises(
        DataError, match=rf"x\.txt\{suffix} is damaged, cut short, or not what its name says: .*anew\.$"
    ):
        list(lines(file))


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_wrong_byte_is_named_with_its_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](b'{"text": "a"}\n' * 4000 + b'{"text": "caf\xe9"}\n' + b'{"text": "b"}\n' * 4000))
    with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}, line 4001: it is not UTF-8 text \(invalid") as caught:
        list(lines(file))
    assert "\n" not in str(caught.value)


def test_a_cut_half_of_a_wide_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("one\ntwo".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"x\.txt, line 2: it is not UTF-16 text"):
        list(lines(tmp_path / "x.txt"))


def test_what_unpacks_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("streams", "plain"):
        monkeypatch.setattr(f"flashsae.text.{module}.LONGEST", 100_000)
    for name, content in (
        ("x.txt.gz", b"0" * (1 << 24)),
        ("y.txt.gz", b"0\n" * (1 << 20)),
        ("z.json.gz", b'["' + b"0" * (1 << 24)),
        ("z.jsonl.gz", b'{"text": "' + b"0" * (1 << 24)),
    ):
        bomb = tmp_path / name
        bomb.write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=r"it is longer than 100,000 characters, which no document is"):
            open_text(bomb)


def test_without_the_extra_a_zst_is_refused_and_a_gz_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f"this needs {module}: pip install 'flashsae[{extra}]'")

    monkeypatch.setattr(streams, "require", missing)
    for suffix, pack in PACKERS.items():
        (tmp_path / f"x.txt{suffix}").write_bytes(pack(b"one\n\ntwo"))
    assert list(open_text(tmp_path / "x.txt.gz").documents()) == ["one", "two"]
    with pytest.raises(MissingExtraError, match="pyarrow"):
        open_text(tmp_path / "x.txt.zst")

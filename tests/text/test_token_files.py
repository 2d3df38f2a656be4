"""Files of token ids as several trainers write them, cut at separators, rows or pieces; none of them is executed."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsae.errors import ConfigError, DataError
from flashsae.text.content import Tokens
from flashsae.text.open import open_text

EOS = 50256
DOCUMENTS = [[1, 2, 3], [65000, 5], [6], [7, 8, 9, 10]]


def flat(dtype: str = "uint16", *, last: bool = True) -> np.ndarray:
    """Return the documents with a separator behind each, but perhaps not behind the last."""
    ids = [token for document in DOCUMENTS for token in (*document, EOS)]
    return np.array(ids if last else ids[:-1], dtype)


def documents(*args: Any, **settings: Any) -> list[list[int]]:
    found = list(open_text(*args, **settings).documents())
    return [content.ids.tolist() for content in found if isinstance(content, Tokens) and content.keep is None]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_documents_stand_between_separators(tmp_path: Path, dtype: str, last: bool) -> None:
    ids = flat(dtype, last=last)
    np.save(tmp_path / "x.npy", ids)
    ids.tofile(tmp_path / "x.bin")
    for file, told in (("x.npy", {}), ("x.npy", {"dtype": dtype}), ("x.bin", {"dtype": dtype})):
        text = open_text(tmp_path / file, separator=EOS, **told)  # type: ignore[arg-type]
        assert f"tokens of {dtype} between {EOS}" in text.name
        assert documents(tmp_path / file, separator=EOS, **told) == DOCUMENTS
        assert [number for number, _ in text.numbered(2)] == [2, 3]
    assert open_text(tmp_path / "x.npy", separator=EOS).fingerprint != open_text(tmp_path / "x.npy").fingerprint


def test_separators_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.text.token_files._SCAN", 3)
    np.save(tmp_path / "x.npy", np.array([EOS, EOS, 1, EOS, EOS, EOS, 2, 3, 4, 5], np.uint16))
    assert documents(tmp_path / "x.npy", separator=EOS) == [[1], [2, 3, 4, 5]]
    np.save(tmp_path / "y.npy", np.array([1, 2], np.uint16))
    assert documents(tmp_path / "[xy].npy", separator=EOS) == [[1], [2, 3, 4, 5], [1, 2]]


def test_without_separators_there_are_pieces(tmp_path: Path) -> None:
    (np.arange(10_001) % 50_000).astype(np.uint32).tofile(tmp_path / "x.bin")
    pieces = documents(tmp_path / "x.bin", dtype="uint32")
    assert [token for piece in pieces for token in piece] == [i % 50_000 for i in range(10_001)]
    assert set(map(len, pieces[:-1])) == {10_001 // 64}
    np.zeros(8192 * 64 + 5, np.uint16).tofile(tmp_path / "y.bin")
    assert list(map(len, documents(tmp_path / "y.bin", dtype="uint16"))) == [8192] * 64 + [5]


def test_rows_of_a_matrix_are_documents(tmp_path: Path) -> None:
    for order in ("C", "F"):
        np.save(tmp_path / "x.npy", np.asarray(np.arange(12, dtype=np.int64).reshape(3, 4), order=order))
        assert documents(tmp_path / "x.npy") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_folder_of_nanogpt_is_its_train_file(tmp_path: Path) -> None:
    flat().tofile(tmp_path / "train.bin")
    flat()[:4].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 7}))
    (tmp_path / "prepare.py").write_text("raise SystemExit")
    assert documents(tmp_path, dtype="uint16", separator=EOS) == DOCUMENTS
    assert documents(tmp_path, dtype="uint16", separator=EOS, split="val") == DOCUMENTS[:1]
    both = documents(str(tmp_path / "*.bin"), dtype="uint16", separator=EOS)
    assert both == DOCUMENTS + DOCUMENTS[:1]
    text = open_text(str(tmp_path / "*.bin"), dtype="uint16", separator=EOS)
    assert [number for number, _ in text.numbered(3)] == [3, 4]
    in_any_order = text.in_any_order
    assert in_any_order is not None
    assert in_any_order()[4] == Tokens(DOCUMENTS[0])
    (tmp_path / "a.txt").write_text("text goes first")
    assert list(open_text(tmp_path).documents()) == ["text goes first"]
    assert documents(tmp_path, dtype="uint16", separator=EOS) == DOCUMENTS  # of which only tokens have such a thing


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "uint16"), (20240801, "uint32")])
def test_headers_of_llm_c_tell_the_dtype(tmp_path: Path, magic: int, dtype: str) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(flat())
    (tmp_path / "x.bin").write_bytes(header.tobytes() + flat(dtype).tobytes())
    assert documents(tmp_path / "x.bin", separator=EOS) == DOCUMENTS
    with pytest.raises(ConfigError, match=f"text_dtype: .* says that it holds {dtype}, got 'int64'"):
        open_text(tmp_path / "x.bin", dtype="int64")
    (tmp_path / "x.bin").write_bytes(header.tobytes() + flat(dtype).tobytes()[:-1])
    with pytest.raises(DataError, match="is cut short: its header says that 14 tokens follow"):
        open_text(tmp_path / "x.bin")


def write_megatron(folder: Path, sizes: list[int], bounds: list[int], **changed: Any) -> None:
    """Write an index as Megatron does: sizes and places of sequences, and which of them begin documents."""
    ids = np.concatenate([np.array(document, np.uint16) for document in DOCUMENTS])
    ids.tofile(folder / "x.bin")
    places = changed.get("places", [2 * sum(sizes[:i]) for i in range(len(sizes))])
    head = changed.get("magic", b"MMIDIDX\0\0") + struct.pack("<QB", 1, changed.get("code", 8))
    head += struct.pack("<QQ", changed.get("count", len(sizes)), len(bounds))
    arrays = np.array(sizes, np.int32).tobytes(), np.array(places, np.int64).tobytes(), np.array(bounds).tobytes()
    (folder / "x.idx").write_bytes(head + b"".join(arrays))


def test_an_index_of_megatron_tells_the_documents(tmp_path: Path) -> None:
    sizes = list(map(len, DOCUMENTS))
    write_megatron(tmp_path, sizes, [0, 1, 2, 3, 4])
    assert documents(tmp_path / "x.bin") == DOCUMENTS
    write_megatron(tmp_path, sizes, [0, 2, 4])
    assert documents(tmp_path / "x.bin") == [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2] + DOCUMENTS[3]]
    write_megatron(tmp_path, sizes, [])
    assert documents(tmp_path / "x.bin") == DOCUMENTS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"magic": b"SOMETHING"}, "no index of Megatron"),
        ({"code": 6}, "no index of Megatron"),
        ({"count": 2**60}, "is cut short"),
        ({"places": [0, 6, 10, 2**40]}, "does not fit"),
        ({"places": [0, 6, -2, 12]}, "does not fit"),
        ({"bounds": [0, 9]}, "does not fit"),
        ({"bounds": [3, 1, 4]}, "does not fit"),
        ({"sizes": [3, 2, -1, 4]}, "does not fit"),
        ({"sizes": [3, 2, 1, 400]}, "does not fit"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write_megatron(
        tmp_path, changed.pop("sizes", list(map(len, DOCUMENTS))), changed.pop("bounds", [0, 1, 2, 3, 4]), **changed
    )
    with pytest.raises(DataError, match=message):
        open_text(tmp_path / "x.bin")


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("x.npy", np.array([Bomb()], object), {}, "is no array of token ids: "),
        ("x.npy", np.array([1.5]), {}, "expected token ids, whole numbers in a flat array or a matrix, got float64"),
        ("x.npy", np.zeros((2, 2, 2), int), {}, r"got int64 of shape \[2, 2, 2\]"),
        ("x.npy", np.array([1, -5, 3]), {}, r"x\.npy, document 1: expected token ids from 0 to below 2\*\*31, got -5"),
        ("x.npy", np.array(["a"]), {}, "got <U1"),
        ("x.npy", np.array([], np.uint16), {}, "is empty"),
        ("x.npy", b"no header", {}, "is no array of token ids: "),
        ("x.npy", pickle.dumps(Bomb()), {}, "is no array of token ids: "),
        ("x.npy", np.arange(9), {"dtype": "uint16"}, "text_dtype: .* says that it holds int64, got 'uint16'"),
        ("x.bin", b"1234", {}, "text_dtype: .* does not say how its tokens are stored; give --text-dtype uint16"),
        ("x.bin", b"123", {"dtype": "uint16"}, "holds 3 bytes, which are no whole number of uint16"),
        ("x.bin", b"", {"dtype": "uint16"}, "is empty"),
        ("x.bin", b"1234", {"dtype": "uint16", "separator": 7}, r"text_separator: .*x\.bin holds no token 7\. Give"),
        (
            "x.bin",
            b"1234",
            {"dtype": "float16"},
            "text_dtype: expected one of uint16, uint32, int32, int64, got 'float",
        ),
        ("x.bin", b"1234", {"dtype": "uint16", "column": "ids"}, "text_column: expected nothing beside files of token"),
        ("x.txt", b"text", {"dtype": "uint16"}, "text_dtype: expected nothing beside files of text"),
        ("x.txt", b"text", {"separator": 0}, "text_separator: expected nothing beside files of text"),
        ("x.bin.gz", b"", {"dtype": "uint16"}, r"a \.bin file cannot be read while it is compressed"),
    ],
)
def test_what_is_no_file_of_tokens_is_told(
    tmp_path: Path, name: str, content: Any, settings: dict[str, Any], message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises((DataError, ConfigError), match=message):
        list(open_text(tmp_path / name, **settings).documents())

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae import documents
from flashsae.errors import CheckpointError


def test_a_document_gives_back_what_was_written(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"x": "ä\ud800"}, "n": float("nan")}
    documents.write_document(tmp_path / "d.json", content)
    read = documents.load_document(tmp_path / "d.json", dict[str, Any])
    assert str({name: read[name] for name in content}) == str(content)


def test_every_flipped_bit_of_a_document_is_found_or_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    documents.write_document(path, {"name": "text", "rows": [12, 34], "share": 0.25})
    whole, good = path.read_bytes(), documents.load_document(path, dict[str, Any])
    good.pop(documents.SEAL)
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            read = documents.load_document(path, dict[str, Any])
        except CheckpointError:
            continue
        assert {name: read.get(name) for name in good} == good


@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, '{"a": 1, "a": 2}', "[]", "3", "\ufeff{}", '{"a": ' * 50_000, "{", "\x00"],
)
def test_what_is_no_object_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"d\.json"):
        documents.load_document(tmp_path / "d.json", dict[str, Any])


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a folder, where a file is expected"):
        documents.load_document(tmp_path, dict[str, Any])
    with pytest.raises(CheckpointError, match="it is a folder, where a file is expected"):
        documents.load_tensors(tmp_path)


def test_tensors_carry_their_checksum(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.bfloat16)}
    documents.save_tensors_atomic(path, tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in documents.load_tensors(path).items())
    whole = path.read_bytes()
    for place in range(len(whole) - 30, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="its checksum does not fit"):
            documents.load_tensors(path)


def test_a_checksum_that_must_be_there_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    documents.write_document(path, {"format": "f", "format_version": 1})
    documents.load_document(path, dict[str, Any], head=("f", 1), must_be_sealed=True)
    path.write_text(json.dumps({"format": "f", "format_version": 1}))
    documents.load_document(path, dict[str, Any], head=("f", 1))
    with pytest.raises(CheckpointError, match="its checksum does not fit"):
        documents.load_document(path, dict[str, Any], head=("f", 1), must_be_sealed=True)


def test_yaml_gives_back_what_was_written(tmp_path: Path) -> None:
    twice = ["a", 1]
    content = {"z": "on", "a": [1, 2.5, None, True, twice, twice], "text": "ä\ud800: 2024-01-01", "in": {"1": "1.0"}}
    documents.write_yaml(tmp_path / "c.yaml", content)
    read = documents.load_yaml(tmp_path / "c.yaml")
    assert read == content
    assert list(read) == list(content)


def test_yaml_of_others_is_read_as_what_json_could_hold(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "\ufeff# as people write it\nk: 32  # of a token\nday: 2024-01-01\nnone:\nx: [a, 'b']\n"
    )
    assert documents.load_yaml(tmp_path / "c.yaml") == {"k": 32, "day": "2024-01-01", "none": None, "x": ["a", "b"]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "no mapping"),
        ("- a", "no mapping"),
        ("text", "no mapping"),
        ("a: 1\na: 2", "a name stands there twice"),
        ("x: {a: 1, 'a': 1}", "a name stands there twice"),
        ("a: &a [1]\nb: *a", "an alias in it"),
        ("a: &a [*a]", "an alias in it"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "the tag|an alias"),
        (
            "a: &a [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1) if i else '*a'] * 9)}]\n" for i in range(40)),
            "an alias",
        ),
        ("1: a", "no text"),
        ("on: a", "no text"),
        ("[a]: b", "no text"),
        ("a: !!python/object/apply:os.system ['true']", "the tag"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!set {b, c}", "the tag"),
        ("a: !!map text", "the tag"),
        ("a: !!int text", "damaged"),
        ("a: !!int ''", "damaged"),
        ("a: !!bool perhaps", "damaged"),
        ("a: " + "9" * 5000, "damaged"),
        ("a: [", "damaged"),
        ("a: b: c", "damaged"),
        ("a: 1\n---\na: 2", "damaged"),
        ("a: \x00", "damaged"),
        ("a: " + "[" * 50_000, "damaged"),
        ("a: " + "x" * (1 << 20), "larger than a MiB"),
    ],
)
def test_yaml_that_is_damaged_or_hostile_is_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^cannot read .*c\.yaml: .*({sentence}).*Write it again\.$"):
        documents.load_yaml(tmp_path / "c.yaml", "Write it again.")


def test_yaml_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        documents.load_yaml(tmp_path / "c.yaml")
    with pytest.raises(CheckpointError, match="it is a folder, where a file is expected"):
        documents.load_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(CheckpointError, match="damaged or not of this format"):
        documents.load_yaml(tmp_path / "c.yaml")

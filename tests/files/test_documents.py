from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae.errors import CheckpointError
from flashsae.files import documents


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")
@pytest.mark.parametrize("load", ["load_json", "load_yaml", "load_tensors", "load_pickle"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(load: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"^cannot read .*file: it is damaged or .* \(it is a pipe or a device\)"):
        getattr(documents, load)(tmp_path / "file")


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


def as_it_was(file: io.BytesIO, content: object) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_it_is(file: io.BytesIO, content: object) -> None:
    torch.save(content, file)


def by_hand(file: io.BytesIO, content: object) -> None:
    pickle.dump(content, file)


def saved(content: object, save: Callable[[io.BytesIO, object], None] = as_it_is) -> bytes:
    """Return what a file would hold."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # some of what is written here is not meant to be any more
        save(buffer, content)
    return buffer.getvalue()


TENSORS = {
    "weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4).T,
    "k": torch.tensor(3, dtype=torch.int32),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "none": torch.zeros(0, 5),
    "number": 7,
    "share": 0.5,
}


@pytest.mark.parametrize("save", [as_it_is, as_it_was])
def test_a_pickle_of_tensors_gives_back_what_was_saved(
    save: Callable[[io.BytesIO, object], None], tmp_path: Path
) -> None:
    path = tmp_path / "ae.pt"
    path.write_bytes(saved(TENSORS, save))
    read = documents.load_pickle(path)
    assert list(read) == list(TENSORS)
    for name, value in TENSORS.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(read[name], value)
            assert read[name].dtype == value.dtype
            assert read[name].is_contiguous()
            assert not read[name].requires_grad
        else:
            assert read[name] == value
    path.write_bytes(saved(torch.nn.Linear(2, 3).state_dict(), save))
    assert set(documents.load_pickle(path)) == {"weight", "bias"}


def test_tensors_of_a_pickle_do_not_share_memory(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    torch.save({"encoder": weight, "decoder": weight.T}, tmp_path / "ae.pt")
    read = documents.load_pickle(tmp_path / "ae.pt")
    read["encoder"].zero_()  # type: ignore[union-attr]
    assert torch.equal(read["decoder"], weight.T)  # type: ignore[arg-type]
    torch.save({"gone": weight}, tmp_path / "ae.pt")  # nor with the file
    assert torch.equal(read["decoder"], weight.T)  # type: ignore[arg-type]


class Hostile:
    """What would make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [as_it_is, as_it_was, by_hand])
def test_a_hostile_pickle_is_refused_and_not_run(save: Callable[[io.BytesIO, object], None], tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "ae.pt"
    path.write_bytes(saved({"b_dec": torch.zeros(2), "k": Hostile(ran)}, save))
    with pytest.raises(
        CheckpointError, match=r"ae\.pt is not read: it is damaged, or (calls \w+\.mkdir, where|does more than)"
    ) as error:
        documents.load_pickle(path)
    assert not ran.exists()
    assert "\n" not in str(error.value)
    torch.load(path, weights_only=False) if save is not by_hand else pickle.loads(path.read_bytes())
    assert ran.exists()  # so it would have


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.ones(2)], "holds a list, not a dict of tensors"),
        (torch.ones(2), "holds a Tensor, not a dict of tensors"),
        (3, "holds a int, not a dict of tensors"),
        ({1: torch.ones(2)}, "a int in the place of a name"),
        ({"ae": {"weight": torch.ones(2)}}, "'ae' in it is a dict, where tensors and numbers are expected"),
        ({"name" * 99: "text"}, "'namename.{50,60} in it is a str"),
        ({"a": None}, "'a' in it is a NoneType"),
        ({"a": torch.eye(3).to_sparse()}, "'a' in it is a sparse_coo tensor, where dense ones are expected"),
        ({"a": torch.ones(3, device="meta")}, "'a' in it is a meta tensor"),
        ({"a": torch.ones(1).expand(10**13)}, r"'a' in it is \[10000000000000\], more values than are stored"),
        (torch.nn.Linear(2, 2), "calls torch.nn.modules.linear.Linear, where a file of tensors calls nothing"),
    ],
)
def test_a_pickle_of_something_else_is_one_sentence(content: object, told: str, tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(saved(content))
    with pytest.raises(CheckpointError, match=told) as error:
        documents.load_pickle(tmp_path / "ae.pt")
    assert str(error.value).startswith(str(tmp_path / "ae.pt"))
    assert len(str(error.value)) < 400


def test_a_pickle_may_hold_its_tensors_in_a_dict_of_a_name(tmp_path: Path) -> None:
    path, weight = tmp_path / "sae_weights.pt", torch.ones(2)
    torch.save({"sae": {"W": weight}, "version": "2.0.0b34"}, path)
    assert torch.equal(documents.load_pickle(path, "sae")["W"], weight)  # type: ignore[arg-type]
    for content in ({"W": weight}, {"sae": weight}, {"sae": None}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"sae_weights\.pt holds no dict of tensors called 'sae'\. Save it"):
            documents.load_pickle(path, "sae")
    torch.save({"sae": {"W": weight, "name": "x"}}, path)
    with pytest.raises(CheckpointError, match="'name' in it is a str"):
        documents.load_pickle(path, "sae")
    torch.save([weight], path)
    with pytest.raises(CheckpointError, match="holds a list, not a dict of tensors"):
        documents.load_pickle(path, "sae")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("quantised", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        ("sparse_csr", lambda: torch.eye(3).to_sparse_csr()),
    ],
)
def test_tensors_that_torch_warns_of_are_one_sentence(
    kind: str, make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    with warnings.catch_warnings(action="ignore"):
        (tmp_path / "ae.pt").write_bytes(saved({"a": make()}))
    with pytest.raises(CheckpointError, match=f"'a' in it is a {kind} tensor, where dense ones are expected"):
        documents.load_pickle(tmp_path / "ae.pt")


@pytest.mark.parametrize("save", [as_it_is, as_it_was])
def test_every_damage_to_a_pickle_is_found_or_does_no_harm(
    save: Callable[[io.BytesIO, object], None], tmp_path: Path
) -> None:
    path = tmp_path / "ae.pt"
    path.write_bytes(whole := saved({"w": torch.arange(6.0), "k": torch.tensor(3)}, save))
    good = documents.load_pickle(path)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"ae\.pt"):
            documents.load_pickle(path)
    if save is as_it_was:
        return  # it has no checksums
    for place in range(0, 8 * len(whole), 61):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            read = documents.load_pickle(path)
        except CheckpointError:
            continue
        assert all(torch.equal(read[name], good[name]) for name in good)  # type: ignore[arg-type]


def test_archives_that_torch_save_does_not_write_are_one_sentence(tmp_path: Path) -> None:
    path, members = tmp_path / "ae.pt", dict.fromkeys(("sys_info", "pickle", "storages", "tensors"), b"\x80\x02}.")
    with tarfile.open(path, "w") as tar:  # as the first versions of torch wrote
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(CheckpointError, match=r"cannot read .*ae\.pt: it is damaged or not of this format"):
        documents.load_pickle(path)
    with (
        zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(10**5)}))) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped,
    ):
        for record in plain.infolist():
            zipped.writestr(record.filename, plain.read(record))
    with pytest.raises(CheckpointError, match=r"ae\.pt is not read: torch\.save writes no such archive"):
        documents.load_pickle(path)


def test_a_pickle_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "ae.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(documents.load_pickle(tmp_path / "ae.pt")["a"], torch.ones(2))  # type: ignore[arg-type]


def test_a_pickle_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*ae\.pt: there is no such file\. Save it again"):
        documents.load_pickle(tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="it is a folder, where a file is expected"):
        documents.load_pickle(tmp_path)

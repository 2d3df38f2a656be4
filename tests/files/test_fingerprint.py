"""The same content has the same digits wherever it lies; other content has others, wherever it differs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashsae.errors import ConfigError, DataError
from flashsae.files import fingerprint
from flashsae.files.fingerprint import files_digest, rows_digest, tensors_digest
from flashsae.lm.weights import loaded_fingerprint, model_fingerprint
from flashsae.text.dataset import TextDataset
from flashsae.text.open import open_text


def test_a_byte_in_the_middle_of_a_file_counts_and_its_place_does_not(tmp_path: Path) -> None:
    content = "".join(f"paragraph {i}\n\n" for i in range(60_000))
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(content)
    middle = len(content) // 2
    (tmp_path / "c" / "x.txt").write_text(f"{content[:middle]}~{content[middle + 1 :]}")
    a, b, c = (open_text(tmp_path / folder).fingerprint for folder in ("a", "b", "c"))
    assert a == b
    assert a != c
    assert open_text(tmp_path / "a" / "x.txt").fingerprint == a


def test_large_files_are_hashed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = fingerprint.sha256
    monkeypatch.setattr(fingerprint, "_REMEMBERED_BYTES", 4)
    monkeypatch.setattr(fingerprint, "sha256", lambda path: hashed.append(path) or real(path))
    file = tmp_path / "x.bin"
    file.write_bytes(b"0123")
    first = files_digest([file], names=True)
    assert files_digest([file], names=True) == first
    assert len(hashed) == 1
    file.write_bytes(b"01234")
    assert files_digest([file], names=True) != first


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone: No such file or directory"):
        files_digest([tmp_path / "gone"], names=True)


def test_texts_know_themselves_by_documents_column_and_order(tmp_path: Path) -> None:
    assert open_text(["a", "bc"]).fingerprint != open_text(["ab", "c"]).fingerprint
    assert open_text(["a", "\ud800"]).fingerprint == open_text(["a", "\ud800"]).fingerprint
    (tmp_path / "x.jsonl").write_text('{"a": "one", "b": "two"}')
    a, b = (open_text(tmp_path / "x.jsonl", column=column).fingerprint for column in "ab")
    assert a != b
    assert TextDataset("mine", lambda start: iter(())).fingerprint == TextDataset("mine", iter).fingerprint
    assert open_text(["a", "b"]).n_documents == 2


def test_tensors_of_any_dtype_and_shape() -> None:
    values = torch.tensor(3.0), torch.zeros(0, 2), torch.ones(2, 3, dtype=torch.bfloat16).T
    digests = [tensors_digest([("x", value)]) for value in values]
    assert len(set(digests)) == 3
    assert tensors_digest([("x", values[2].contiguous())]) == digests[2]
    x = torch.randn(9000, 3)
    y = x.clone()
    assert rows_digest(x) == rows_digest(y)
    y[0] += 1
    assert rows_digest(x) != rows_digest(y)
    assert rows_digest(x) != rows_digest(x[:-1])


def test_a_model_in_a_folder_knows_itself_by_weights_config_and_tokenizer(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2().base_model
    model.save_pretrained(tmp_path / "a")
    tiny.word_tokenizer().save_pretrained(tmp_path / "a")
    moved = shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = model_fingerprint(str(tmp_path / "a"))
    (moved / "README.md").write_text("nothing that is read")
    (moved / ".cache.json").write_text("{}")
    assert model_fingerprint(str(moved)) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        changed = shutil.copytree(tmp_path / "a", tmp_path / f"without {name}")
        data = bytearray((changed / name).read_bytes())
        data[-3] ^= 1
        (changed / name).write_bytes(data)
        assert model_fingerprint(str(changed)) != before, name
    with pytest.raises(ConfigError, match="model: there is no such folder"):
        model_fingerprint(str(tmp_path / "nowhere" / "at" / "all"))


def test_a_loaded_model_knows_itself_by_values_and_tokenizer(tiny: ModuleType) -> None:
    model, other = tiny.gpt2().base_model, tiny.gpt2().base_model
    plain = loaded_fingerprint(model, tiny.word_tokenizer())
    assert loaded_fingerprint(other, tiny.word_tokenizer()) == plain
    assert loaded_fingerprint(other, tiny.word_tokenizer(bos=True)) != plain
    with torch.no_grad():
        other.h[1].mlp.c_fc.weight[3, 3] += 1
    assert loaded_fingerprint(other, tiny.word_tokenizer()) != plain


def test_a_source_is_told_apart_by_what_it_reads_and_how(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    plain = tiny.source(model=model)
    assert tiny.source(dataclasses.replace(tiny.SMALL, model="moved")).fingerprint == plain.fingerprint
    for change in ({"context_length": 15}, {"hookpoint": "h.0"}, {"mask_special": False}, {"max_documents": 3}):
        other = tiny.source(dataclasses.replace(tiny.SMALL, **change), model=model)
        assert other.fingerprint != plain.fingerprint, change
    assert tiny.source(text=open_text(["other"]), model=model).fingerprint == plain.fingerprint
    assert tiny.source(text=open_text(["other"]), model=model).identity["text"] != plain.identity["text"]

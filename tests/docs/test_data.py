"""Every kind of data that the page lists is read by the command beside it, as the table says."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from flashsae.cli import main
from flashsae.data import language_model
from flashsae.data.cache_index import CacheIndex
from flashsae.text import hub
from flashsae.text import open as open_module
from helpers.packers import PACKERS
from helpers.pages import ROOT, code_blocks

PAGE = ROOT / "docs" / "data.md"
ROWS = re.findall(r"^\| .*\| `(flashsae cache [^`]*)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
TEXTS = [f"The cat number {i} sat on the mat." for i in range(6)]
IDS = [[1996, 4937, 2938, 2006, 1996, 13523 + i] for i in range(6)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "So it did."}] for text in TEXTS]
SEPARATOR = 102


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_arrow(path: Path, table: Any) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_texts(folder: Path) -> None:
    table = pyarrow.table({"title": ["A cat"] * 6, "body": TEXTS, "text": TEXTS})
    (folder / "prose.txt").write_text("\n\n".join(TEXTS))
    (folder / "utf16.txt").write_text("\n\n".join(TEXTS), "utf-16")
    write_json(folder / "prose.jsonl", table.to_pylist())
    (folder / "prose.json").write_text(json.dumps(TEXTS))
    pyarrow.csv.write_csv(table, folder / "prose.csv")
    pyarrow.csv.write_csv(table, folder / "prose.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    pyarrow.parquet.write_table(table, folder / "prose.parquet")
    write_arrow(folder / "prose.arrow", table)
    for name in ("prose.txt.gz", "prose.jsonl.zst", "prose.csv.zst", "prose.arrow.gz"):
        plain, dot, suffix = name.rpartition(".")
        (folder / name).write_bytes(PACKERS[dot + suffix]((folder / plain).read_bytes()))
    (folder / "folder" / "more").mkdir(parents=True)
    write_json(folder / "folder" / "more" / "train.jsonl", table.to_pylist())
    (folder / "folder" / "train.txt").write_text("\n\n".join(TEXTS))
    (folder / "folder" / "validation.txt.gz").write_bytes(PACKERS[".gz"]("\n\n".join(TEXTS[:2]).encode()))


def write_tokens(folder: Path) -> None:
    padded = [
        {"input_ids": [*ids, 0, 0], "attention_mask": [1] * 6 + [0, 0], "loss_mask": [0, *[1] * 7]} for ids in IDS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(padded), folder / "ids.parquet")
    write_json(folder / "ids.jsonl", padded)
    flat = np.array([token for ids in IDS for token in (*ids, SEPARATOR)], np.uint16)
    np.save(folder / "ids.npy", flat)
    (folder / "nanogpt").mkdir()
    flat.tofile(folder / "nanogpt" / "train.bin")
    flat[:7].tofile(folder / "nanogpt" / "val.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(flat)
    (folder / "llmc.bin").write_bytes(header.tobytes() + flat.tobytes())
    np.array(IDS, np.uint16).tofile(folder / "megatron.bin")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 6, 7)
    arrays = np.full(6, 6, np.int32), np.arange(6) * 12, np.arange(7)
    (folder / "megatron.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


def write_repositories(folder: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=rows, test=rows.select([0, 1])).save_to_disk(str(folder / "saved"))
    for name in ("clone/en", "clone/de", "datasets--owner--name/blobs", "datasets--owner--name/snapshots/aaa"):
        (folder / name).mkdir(parents=True)
    for language in ("en", "de"):
        rows.to_parquet(folder / "clone" / language / "train.parquet")
    configs = "\n".join(f"- {{config_name: {name}, data_files: {name}/*}}" for name in ("en", "de"))
    (folder / "clone" / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    repository = folder / "datasets--owner--name"
    (repository / "blobs" / "123").write_bytes((folder / "clone" / "en" / "train.parquet").read_bytes())
    os.symlink("../../blobs/123", repository / "snapshots" / "aaa" / "train.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    write_tokens(folder)
    write_repositories(folder)
    pyarrow.parquet.write_table(
        pyarrow.table({"conversations": [[{"from": "human", "value": text}] for text in TEXTS]}),
        folder / "sharegpt.parquet",
    )
    write_json(folder / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return folder


@pytest.fixture(scope="module")
def loaded() -> Any:
    """What loads minilm, once; with a chat template, which this model lacks."""

    @functools.cache
    def load(*arguments: Any) -> Any:
        found = original(*arguments)
        found[1].chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        return found

    original = language_model.load_with_account
    return load


def hub_of(rows: Any) -> Any:
    """Stand for the hub, with one data set."""

    def load(name: str, subset: str | None, *, split: str, streaming: bool, revision: str | None = None) -> Any:
        assert (name, subset, split, streaming, revision) in (
            ("owner/name", "en", "test", True, None),
            ("owner/name", None, "train", False, "v2"),
        )
        return rows.to_iterable_dataset() if streaming else rows

    return SimpleNamespace(load_dataset=load)


@pytest.mark.parametrize("command", ROWS)
def test_the_command_of_each_kind_reads_it(
    command: str, folder: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(language_model, "load_with_account", loaded)
    if "owner/name" in command:
        fake = hub_of(datasets.Dataset.from_dict({"text": TEXTS}))
        monkeypatch.setattr(hub, "require", lambda name, extra: fake)
    monkeypatch.setattr(open_module, "python_docs", lambda: tuple(TEXTS))  # half a million tokens are for other tests
    words = [str(tmp_path / word) if word == "acts" else word for word in shlex.split(command)[1:]]
    with pytest.raises(SystemExit) as done:
        main([*words, "--max-tokens", "500", "--device", "cpu"])
    assert not done.value.code
    index = CacheIndex.read(tmp_path / "acts")
    n_documents = 12 if "folder --out" in command or "@0.7" in command else 2 if "split validation" in command else 6
    if ".npy" in command or "ids." in command or "megatron" in command or "nanogpt" in command:
        assert index.rows == 6 * (5 if "loss_mask" in command else 6)
    elif "llmc" not in command:
        assert index.rows >= 9 * (2 if "saved" in command else n_documents)


def test_the_table_has_all_kinds() -> None:
    assert len(ROWS) == 34


def test_the_texts_of_a_program() -> None:
    (code,) = code_blocks(PAGE)
    found: dict[str, Any] = {}
    exec(code, found)
    assert [len(list(text.documents())) for text in found["several"]] == [2, 2, 1, 1, *[2] * 8]

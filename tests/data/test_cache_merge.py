"""Merged caches hold the rows of their parts, one document in one part of the split; what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex, verify_cache
from flashsae.data.cache_merge import merge_caches
from flashsae.data.cache_writer import write_cache
from flashsae.errors import CheckpointError, ConfigError, DataError, StorageError
from flashsae.files.documents import sealed
from flashsae.text.open import open_text
from helpers import kill


@pytest.fixture(scope="module")
def parts(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Complete caches of three texts, which differ in how much was read at a time."""
    folder = tmp_path_factory.mktemp("parts")
    texts = (tiny.DOCUMENTS[:6], tiny.DOCUMENTS[10:14], [*tiny.DOCUMENTS[20:24], " "])
    for number, text in enumerate(texts):
        config = replace(tiny.CACHED, forward_tokens=32 + 16 * number)
        write_cache(folder / str(number), tiny.source(config, open_text(text)), shard_rows=30 + number)
    return tuple(folder / str(number) for number in range(len(texts)))


def everything(place: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    cache = ActivationCache(place, ["h.0", "h.1"], held_out=0.0)
    chunks = [chunk for chunk, _ in cache.chunks("train")]
    acts = {site: torch.cat([chunk.acts[site] for chunk in chunks]) for site in cache.hookpoints}
    ids = torch.cat([chunk.token_ids for chunk in chunks if chunk.token_ids is not None])
    return acts, torch.cat([chunk.group for chunk in chunks]), ids


def test_it_holds_the_rows_of_its_parts_and_keeps_their_documents_apart(
    parts: tuple[Path, ...], tmp_path: Path
) -> None:
    before = [kill.contents(part) for part in parts]
    seen: list[int] = []
    n = merge_caches(parts, tmp_path / "all", seen.append)
    assert [kill.contents(part) for part in parts] == before
    verify_cache(tmp_path / "all")
    each, (acts, group, ids) = [everything(part) for part in parts], everything(tmp_path / "all")
    assert n == len(group) == seen[-1]
    assert all(torch.equal(acts[site], torch.cat([part[0][site] for part in each])) for site in acts)
    assert torch.equal(ids, torch.cat([part[2] for part in each]))
    assert torch.equal(group, torch.cat([part[1] + first for part, first in zip(each, (0, 6, 10))]))
    cache = ActivationCache(tmp_path / "all", "h.0", held_out=0.3)
    train, held_out = (set(group[cache.split_rows(split)].tolist()) for split in ("train", "held_out"))
    assert train
    assert held_out
    assert not train & held_out
    assert len(train | held_out) == 14
    assert cache.read_tokenizer() is not None
    assert cache.settings["forward_tokens"] is None
    assert cache.settings["context_length"] == 16
    assert cache.dataset.startswith("3 texts: a list of 6 texts")
    assert os.stat(tmp_path / "all" / "h.0" / "00000.safetensors").st_nlink == 2


def test_merged_caches_are_merged_again_to_the_same_rows(parts: tuple[Path, ...], tmp_path: Path) -> None:
    merge_caches(parts, tmp_path / "all")
    merge_caches(parts[:2], tmp_path / "two")
    merge_caches([tmp_path / "two", parts[2]], tmp_path / "again")
    for got, expected in zip(everything(tmp_path / "again"), everything(tmp_path / "all")):
        assert str(got) == str(expected)
    assert CacheIndex.read(tmp_path / "again").settings == CacheIndex.read(tmp_path / "all").settings
    with pytest.raises(DataError, match=r"holds a text that another one to be merged holds too \(a list of 4 texts"):
        merge_caches([tmp_path / "two", parts[1]], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_text_in_a_mixture_is_not_merged_once_more(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"a": tiny.DOCUMENTS[:6], "b": tiny.DOCUMENTS[10:14], "c and 3% c": tiny.DOCUMENTS[20:24]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(few))
    write_cache(tmp_path / "ab", tiny.source(tiny.CACHED, open_text(f"{tmp_path}/a.txt@0.7, {tmp_path}/b.txt@0.3")))
    monkeypatch.chdir(tmp_path)  # where the same text has another name
    for name, text in {"b": "b.txt", "cb": "c and 3% c.txt@2, b.txt", "c": "c and 3% c.txt"}.items():
        write_cache(tmp_path / name, tiny.source(tiny.CACHED, open_text(text)))
    for twice in (("ab", "b"), ("b", "ab"), ("ab", "cb"), ("cb", "c")):
        with pytest.raises(DataError, match="holds a text that another one to be merged holds too"):
            merge_caches(twice, "twice")
    assert merge_caches(["ab", "c"], "all")


def test_where_there_are_no_links_it_holds_copies_that_were_checked(
    parts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_caches(parts, tmp_path / "linked")

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge_caches(parts, tmp_path / "copied")
    assert kill.contents(tmp_path / "copied") == kill.contents(tmp_path / "linked")
    damaged = Path(shutil.copytree(parts[1], tmp_path / "damaged"))
    shard = damaged / "h.1" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"damaged/h\.1/00001\.safetensors is damaged: its checksum"):
        merge_caches([parts[0], damaged], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_may_not_be_written_to_are_merged_and_what_comes_out_may(
    parts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts]
    for path in (path for part in closed for path in (part, *part.rglob("*"))):
        path.chmod(0o555 if path.is_dir() else 0o444)
    opened = os.open

    def as_for_others_than_root(path: Any, flags: int, *mode: Any) -> int:
        is_forbidden = flags & os.O_RDWR and os.path.exists(path) and not os.stat(path).st_mode & 0o200
        if is_forbidden:
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", as_for_others_than_root)
    merge_caches(closed, tmp_path / "out")
    for path in (tmp_path / "out" / "tokenizer", *(tmp_path / "out" / "tokenizer").rglob("*")):
        assert path.stat().st_mode & 0o200
    for path in (path for part in closed for path in (part, *part.rglob("*"))):
        path.chmod(0o755)  # so that the folder of the test can be removed


def test_a_kill_leaves_nothing_or_all(parts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = kill.survive_every_kill(
        tmp_path, monkeypatch, work=lambda root: (root / "c").exists() or merge_caches(parts[:2], root / "c")
    )
    assert moments > 20


def other(tiny: ModuleType, folder: Path, **changes: Any) -> Path:
    stored = {name: changes.pop(name) for name in ("dtype", "compression", "model") if name in changes}
    model = {"model": stored.pop("model")} if "model" in stored else {}
    source = tiny.source(replace(tiny.CACHED, **changes), open_text(tiny.DOCUMENTS[30:33]), **model)
    write_cache(folder, source, **stored)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 8}, "context_length is 16 there, 8 here"),
        ({"hookpoint": "h.1"}, r"hookpoints is \{'h.0': 16, 'h.1': 16\} there, \{'h.1': 16\} here"),
        ({"dtype": "int8"}, "dtype is 'bfloat16' there, 'int8' here"),
        ({"compression": "zstd"}, "cache_compression is 'none' there, 'zstd' here"),
        ({"model": 4}, r"the model \(weights or tokenizer\) was changed since"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_are_refused_by_what_differs(
    changes: dict[str, Any], message: str, tiny: ModuleType, parts: tuple[Path, ...], tmp_path: Path
) -> None:
    if "model" in changes:
        changes = {"model": tiny.gpt2(changes["model"])}
    part = other(tiny, tmp_path / "other", **changes)
    with pytest.raises(DataError, match=rf"other cannot be merged with .*0: {message}"):
        merge_caches([parts[0], part], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_complete_cache_or_given_twice_is_refused(
    tiny: ModuleType, parts: tuple[Path, ...], tmp_path: Path
) -> None:
    def stop(n_rows: int) -> None:
        if n_rows > 60:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "part", tiny.source(tiny.CACHED), shard_rows=30, on_progress=stop)
    with pytest.raises(CheckpointError, match=r"part is not complete \(\d+ rows so far\): finish it"):
        merge_caches([parts[0], tmp_path / "part"], out)
    with pytest.raises(
        CheckpointError, match=r"nowhere holds no index\.json\. Name a folder that flashsae cache wrote"
    ):
        merge_caches([parts[0], tmp_path / "nowhere"], out)
    with pytest.raises(ConfigError, match=r"merge: expected two or more caches, got 1: --merge A B --out C"):
        merge_caches(parts[:1], out)
    with pytest.raises(ConfigError, match=r"merge: expected each cache once, got .*1 twice"):
        merge_caches([parts[1], parts[0], parts[1].parent / "0" / ".." / "1"], out)
    merge_caches(parts, out)
    with pytest.raises(StorageError, match="out exists already and is not overwritten"):
        merge_caches(parts, out)
    with pytest.raises(DataError, match="was merged from others, and nothing is written to it any more"):
        write_cache(out, tiny.source(tiny.CACHED), shard_rows=30)


def test_packed_documents_are_not_merged(parts: tuple[Path, ...], tiny: ModuleType, tmp_path: Path) -> None:
    packed = [tmp_path / "a", tmp_path / "b"]
    for place, text in zip(packed, (tiny.DOCUMENTS[:4], tiny.DOCUMENTS[4:9])):
        write_cache(place, tiny.source(replace(tiny.CACHED, pack=True), open_text(text)))
    with pytest.raises(DataError, match="holds packed documents, which share inputs of the model by their numbers"):
        merge_caches(packed, tmp_path / "out")


@pytest.mark.parametrize("texts", [3, [3], [{"dataset": "a", "fingerprint": "b"}], [{"first": -1}], "x"])
def test_texts_in_an_index_that_are_none_are_refused(texts: Any, parts: tuple[Path, ...], tmp_path: Path) -> None:
    merge_caches(parts, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["settings"]["texts"] = texts
    (tmp_path / "out" / "index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: texts"):
        CacheIndex.read(tmp_path / "out")

"""The cache on disk: what is read is what was streamed, a kill costs nothing, and nothing foreign is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flashsae import files
from flashsae.data.cache import ActivationCache, write_cache
from flashsae.data.language_model import LanguageModelConfig, LanguageModelSource
from flashsae.data.sources import RowSource, split_mask
from flashsae.data.text import open_text
from flashsae.errors import CheckpointError, ConfigError, DataError, StorageError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then"]
DOCUMENTS = [" ".join(WORDS[(i + j * (i + 2)) % 8] for j in range(2 + (i * 7) % 25)) for i in range(40)]
CONFIG = LanguageModelConfig("tiny", ("h.0", "h.1"), context_length=16, batch_tokens=32, device="cpu")
SHARD_ROWS = 100


def tiny() -> tuple[nn.Module, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = GPT2Model(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def make_source(config: LanguageModelConfig = CONFIG, documents: list[str] = DOCUMENTS) -> LanguageModelSource:
    return LanguageModelSource(config, open_text(documents), loaded=tiny())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def source() -> LanguageModelSource:
    return make_source()


@pytest.fixture(scope="module")
def written(source: LanguageModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "whole"
    write_cache(directory, source, shard_rows=SHARD_ROWS)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_rows_and_tokens_are_those_of_the_stream_in_bfloat16(source: LanguageModelSource, written: Path) -> None:
    streamed = [chunks for chunks, _ in source.chunks_by_hookpoint(None)]
    for name in ("h.0", "h.1"):
        cache = ActivationCache(written, name, held_out=0.0)
        acts = torch.cat([chunks[name].acts for chunks in streamed]).to(torch.bfloat16)
        assert cache.n_rows == len(acts) == sum(len(document.split()) for document in DOCUMENTS)
        assert torch.equal(cache.rows(torch.arange(len(acts))), acts)
        read = [chunk for chunk, _ in cache.chunks("train")]
        for field in ("group", "token_ids", "position"):
            expected = torch.cat([getattr(chunks[name], field) for chunks in streamed])
            got = torch.cat([getattr(chunk, field) for chunk in read])
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype
        assert torch.equal(torch.cat([chunk.acts for chunk in read]), acts)


def test_rows_come_in_the_order_asked(written: Path) -> None:
    cache = ActivationCache(written, "h.1")
    everything = cache.rows(torch.arange(cache.n_rows))
    index = torch.randint(cache.n_rows, (333,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(cache.rows(index), everything[index])
    assert cache.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 16)
    assert cache.rows(index).dtype == torch.bfloat16
    for wrong in (-1, cache.n_rows):
        with pytest.raises(DataError, match=rf"has rows 0 to {cache.n_rows - 1}, got {wrong} to {wrong}"):
            cache.rows(torch.tensor([wrong]))


def test_it_is_a_row_source_whose_splits_are_by_document(written: Path) -> None:
    cache = ActivationCache(written, "h.0", held_out=0.3)
    assert isinstance(cache, RowSource)
    train, held_out = cache.split_rows("train"), cache.split_rows("held_out")
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(cache.n_rows))
    assert 0 < len(held_out) < len(train)
    for split, rows in (("train", train), ("held_out", held_out)):
        chunks = [chunk for chunk, _ in cache.chunks(split)]
        assert torch.equal(torch.cat([chunk.acts for chunk in chunks]), cache.rows(rows))
        assert split_mask(torch.cat([chunk.group for chunk in chunks]), 0.3, split).all()


def test_chunks_go_on_at_a_cursor(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.data.cache._CHUNK_ROWS", 40)  # several in a shard
    cache = ActivationCache(written, "h.0")
    whole = list(cache.chunks("train"))
    assert len(whole) > 2
    rest = list(cache.chunks("train", json.loads(json.dumps(whole[1][1]))))
    assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[2:]]
    assert all(torch.equal(a.acts, b.acts) for (a, _), (b, _) in zip(rest, whole[2:]))


def test_it_says_what_it_holds_and_keeps_the_tokenizer(source: LanguageModelSource, written: Path) -> None:
    cache = ActivationCache(written, "h.1")
    assert (cache.model, cache.hookpoint, cache.d_in, cache.dataset) == ("tiny", "h.1", 16, source.text.name)
    assert cache.describe() == f"{cache.n_rows} activations of width 16: tiny at h.1 reading {source.text.name}"
    assert ActivationCache.is_complete(written)
    assert not ActivationCache.is_complete(written.parent)
    assert ActivationCache.read_settings(written) == cache.settings
    assert cache.settings["hookpoints"] == {"h.0": 16, "h.1": 16}
    ids = source.tokenizer(DOCUMENTS[3])["input_ids"]
    assert cache.read_tokenizer()(DOCUMENTS[3])["input_ids"] == ids


def test_rows_are_mapped_not_loaded(written: Path) -> None:
    import numpy as np

    assert all(isinstance(acts, np.memmap) for acts in ActivationCache(written, "h.0")._acts)


# --- interruptions


@pytest.mark.parametrize("kill_at", [1, 5, 12])
def test_an_interrupted_writing_ends_with_the_same_bytes(
    source: LanguageModelSource, written: Path, tmp_path: Path, kill_at: int
) -> None:
    directory = tmp_path / "cache"
    seen: list[int] = []

    def interrupt(n_rows: int) -> None:
        seen.append(n_rows)
        if len(seen) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(directory, source, shard_rows=SHARD_ROWS, on_progress=interrupt)
    assert not ActivationCache.is_complete(directory)
    with pytest.raises(CheckpointError, match=r"is not complete \(\d+ rows so far\): finish it"):
        ActivationCache(directory, "h.0")
    done = sum(json.loads((directory / "index.json").read_text())["shards"])
    assert (done > 0) == (kill_at > 4)
    write_cache(directory, source, shard_rows=SHARD_ROWS, on_progress=seen.append)
    assert contents(directory) == contents(written)
    assert seen[kill_at] > done
    assert seen[-1] == ActivationCache(written, "h.0").n_rows


def test_a_killed_process_leaves_a_cache_that_goes_on(written: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cache
from pathlib import Path
test_cache.write_cache({str(directory)!r}, test_cache.make_source(), shard_rows=test_cache.SHARD_ROWS,
    on_progress=lambda n: time.sleep(0.05))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(directory.glob("h.1/0*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (directory / "h.1" / ".00002.safetensors.123.partial").write_bytes(b"half a shard")
    (directory / "tokens" / "00002.safetensors").write_bytes(b"a shard that the index does not know")
    assert not json.loads((directory / "index.json").read_text())["complete"]
    write_cache(directory, make_source(), shard_rows=SHARD_ROWS)
    assert contents(directory) == contents(written)


def test_a_kill_before_the_first_index_leaves_nothing_in_the_way(
    source: LanguageModelSource, written: Path, tmp_path: Path
) -> None:
    (tmp_path / ".index.json.77.partial").write_text("{")
    write_cache(tmp_path, source, shard_rows=SHARD_ROWS)
    assert contents(tmp_path) == contents(written)


def test_a_full_disk_is_a_storage_error_and_the_cache_goes_on(
    source: LanguageModelSource, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(aside: Path, path: Path) -> None:
        if str(path).endswith("h.1/00001.safetensors"):
            raise OSError(28, "No space left on device")
        replace(aside, path)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(StorageError, match=r"could not write .*00001\.safetensors: No space left on device"):
        write_cache(tmp_path / "cache", source, shard_rows=SHARD_ROWS)
    monkeypatch.undo()
    write_cache(tmp_path / "cache", source, shard_rows=SHARD_ROWS)
    assert contents(tmp_path / "cache") == contents(written)


def test_a_complete_cache_is_left_alone(source: LanguageModelSource, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    write_cache(copy, source, shard_rows=SHARD_ROWS, on_progress=lambda n: pytest.fail("the model ran again"))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("kill_at", [None, 3])
def test_max_tokens_is_exact(source: LanguageModelSource, tmp_path: Path, kill_at: int | None, written: Path) -> None:
    def interrupt(n_rows: int) -> None:
        if n_rows > 100 and kill_at:
            raise KeyboardInterrupt

    if kill_at:
        with pytest.raises(KeyboardInterrupt):
            write_cache(tmp_path / "c", source, shard_rows=50, max_tokens=250, on_progress=interrupt)
    seen: list[int] = []
    write_cache(tmp_path / "c", source, shard_rows=50, max_tokens=250, on_progress=seen.append)
    assert seen.count(250) == 1
    cache = ActivationCache(tmp_path / "c", "h.1")
    assert cache.n_rows == 250
    assert torch.equal(cache.rows(torch.arange(250)), ActivationCache(written, "h.1").rows(torch.arange(250)))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"context_length": 8}, {}, "context_length is 16 there and 8 here"),
        ({"model": "other"}, {}, "model is 'tiny' there and 'other' here"),
        ({"hookpoints": ("h.1",)}, {}, r"hookpoints is \{'h.0': 16, 'h.1': 16\} there and \{'h.1': 16\} here"),
        ({"mask_special": False}, {}, "mask_special is True there and False here"),
        ({"max_norm_ratio": 4.0}, {}, "max_norm_ratio is None there and 4.0 here"),
        ({}, {"max_tokens": 9}, "max_tokens is None there and 9 here"),
        ({}, {"shard_rows": 9}, "shard_rows is 100 there and 9 here"),
        ({"batch_tokens": 64}, {"max_tokens": 9}, "batch_tokens is 32 there and 64 here; max_tokens is None there"),
    ],
)
def test_other_settings_are_refused_by_name(
    copy: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    before = contents(copy)
    with pytest.raises(DataError, match=f"written with other settings: {message}"):
        write_cache(copy, make_source(dataclasses.replace(CONFIG, **changes)), **{"shard_rows": SHARD_ROWS} | arguments)
    assert contents(copy) == before


def test_another_text_is_refused(copy: Path) -> None:
    with pytest.raises(DataError, match=r"dataset is 'a list of 40 texts .*' there and 'a list of 3 texts"):
        write_cache(copy, make_source(documents=DOCUMENTS[:3]), shard_rows=SHARD_ROWS)


def test_a_folder_of_other_things_is_refused_and_untouched(source: LanguageModelSource, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".mine.partial").write_text("kept")
    with pytest.raises(CheckpointError, match=r"holds other files and no index\.json"):
        write_cache(tmp_path, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "thesis.txt"]
    with pytest.raises(StorageError, match="could not write"):
        write_cache(tmp_path / "thesis.txt", source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "is not the index of an activation cache"),
        ({"version": 2}, "reads version 1 of the cache format, got version 2"),
        ({"shards": None}, "is damaged: it lacks 'shards'"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    index = json.loads((copy / "index.json").read_text()) | change
    (copy / "index.json").write_text(json.dumps({name: value for name, value in index.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        ActivationCache(copy, "h.0")


def test_a_missing_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json: there is no such file"):
        ActivationCache(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing", "scrambled", "other rows"])
@pytest.mark.parametrize("kind", ["h.0", "tokens"])
def test_a_damaged_shard_is_refused_by_name(copy: Path, kind: str, damage: str) -> None:
    shard = copy / kind / "00001.safetensors"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "other rows":
        shard.write_bytes((copy / kind / "00002.safetensors").read_bytes())
    else:
        damaged = {"truncated": content[:-1], "longer": content + b"!", "scrambled": b"\xff" * len(content)}
        shard.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{kind}/00001\.safetensors"):
        ActivationCache(copy, "h.0").split_rows("train")


def test_a_hookpoint_is_chosen_where_there_are_several(source: LanguageModelSource, written: Path) -> None:
    for wrong in (None, "h.7"):
        with pytest.raises(ConfigError, match=r"holds h\.0, h\.1; expected one of them"):
            ActivationCache(written, wrong)
    with pytest.raises(ConfigError, match="0 <= held_out < 1"):
        ActivationCache(written, "h.0", held_out=1.0)


def test_a_cache_of_one_hookpoint_needs_no_choice(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", make_source(dataclasses.replace(CONFIG, hookpoints=("h.1",)), DOCUMENTS[:2]))
    assert ActivationCache(tmp_path / "c").hookpoint == "h.1"


def test_too_little_and_bad_numbers_are_refused(source: LanguageModelSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a list of 1 texts .* gives no token to cache"):
        write_cache(tmp_path / "c", make_source(documents=["xyzzy"]))
    with pytest.raises(ConfigError, match="max_tokens: expected at least 1, got 0"):
        write_cache(tmp_path / "d", source, max_tokens=0)
    assert not (tmp_path / "d").exists()

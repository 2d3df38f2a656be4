"""A kill costs nothing, other settings are refused, and nothing foreign is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data import existing
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex, verify_cache
from flashsae.data.cache_writer import CacheDtype, write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import RowShuffle
from flashsae.data.stored import Compression
from flashsae.errors import CheckpointError, ConfigError, DataError, MissingExtraError, StorageError
from flashsae.files import atomic
from flashsae.metrics import FVU
from flashsae.text.open import open_text
from helpers import kill


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kill_at", [1, 5, 12])
def test_an_interrupted_writing_ends_with_the_same_bytes(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path, kill_at: int
) -> None:
    directory = tmp_path / "cache"
    seen: list[int] = []

    def interrupt(n_rows: int) -> None:
        seen.append(n_rows)
        if len(seen) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(directory, cache_source, shard_rows=tiny.SHARD_ROWS, on_progress=interrupt)
    assert not ActivationCache.is_complete(directory)
    with pytest.raises(CheckpointError, match=r"is not complete \(\d+ rows so far\): finish it"):
        ActivationCache(directory, "h.0")
    done = CacheIndex.read(directory).rows
    assert (done > 0) == (kill_at > 4)
    write_cache(directory, cache_source, shard_rows=tiny.SHARD_ROWS, on_progress=seen.append)
    assert contents(directory) == contents(written)
    assert seen[kill_at] > done
    assert seen[-1] == ActivationCache(written, "h.0").n_rows


def test_a_cache_of_packed_documents_goes_on_and_is_split_as_it_was_packed(tiny: ModuleType, tmp_path: Path) -> None:
    def source(held_out: float) -> LanguageModelSource:
        return tiny.source(dataclasses.replace(tiny.CACHED, pack=True, overlap=2), held_out=held_out)

    def interrupt(n_rows: int) -> None:
        if n_rows > 300:
            raise KeyboardInterrupt

    write_cache(tmp_path / "whole", source(0.2), shard_rows=tiny.SHARD_ROWS)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", source(0.2), shard_rows=tiny.SHARD_ROWS, on_progress=interrupt)
    with pytest.raises(DataError, match=r"held_out is 0\.2 there and 0\.1 here"):
        write_cache(tmp_path / "cache", source(0.1), shard_rows=tiny.SHARD_ROWS)
    write_cache(tmp_path / "cache", source(0.2), shard_rows=tiny.SHARD_ROWS)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    parts = [ActivationCache(tmp_path / "cache", "h.0", 0.2).split_rows(split) for split in ("train", "held_out")]
    everything = ActivationCache(tmp_path / "cache", "h.0", 0.0)
    assert sum(map(len, parts)) == everything.n_rows == len(everything.split_rows("train"))
    with pytest.raises(ConfigError, match=r"^held_out: the documents in the cache .* are packed for held_out = 0\.2,"):
        ActivationCache(tmp_path / "cache", "h.0")
    plain = tiny.source(tiny.CACHED)
    write_cache(tmp_path / "plain", plain, shard_rows=tiny.SHARD_ROWS)
    assert "held_out" not in ActivationCache.read_settings(tmp_path / "plain")


def test_a_killed_process_leaves_a_cache_that_goes_on(tiny: ModuleType, written: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from helpers import tiny_models
from flashsae.data.cache_index import CacheIndex
from flashsae.data.cache_writer import CacheDtype, write_cache
write_cache({str(directory)!r}, tiny_models.source(tiny_models.CACHED), shard_rows=tiny_models.SHARD_ROWS,
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
    write_cache(directory, tiny.source(tiny.CACHED), shard_rows=tiny.SHARD_ROWS)
    assert contents(directory) == contents(written)


def test_a_kill_before_the_first_index_leaves_nothing_in_the_way(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path
) -> None:
    (tmp_path / ".index.json.77.partial").write_text("{")
    write_cache(tmp_path, cache_source, shard_rows=tiny.SHARD_ROWS)
    assert contents(tmp_path) == contents(written)


def test_a_full_disk_is_a_storage_error_and_the_cache_goes_on(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(aside: Path, path: Path) -> None:
        if str(path).endswith("h.1/00001.safetensors"):
            raise OSError(28, "No space left on device")
        replace(aside, path)

    monkeypatch.setattr(atomic.os, "replace", refuse)
    with pytest.raises(StorageError, match=r"could not write .*00001\.safetensors: No space left on device"):
        write_cache(tmp_path / "cache", cache_source, shard_rows=tiny.SHARD_ROWS)
    monkeypatch.undo()
    write_cache(tmp_path / "cache", cache_source, shard_rows=tiny.SHARD_ROWS)
    assert contents(tmp_path / "cache") == contents(written)


def test_a_complete_cache_is_left_alone(tiny: ModuleType, cache_source: LanguageModelSource, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    write_cache(
        copy, cache_source, shard_rows=tiny.SHARD_ROWS, on_progress=lambda n: pytest.fail("the model ran again")
    )
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("kill_at", [None, 3])
def test_max_tokens_is_exact(
    cache_source: LanguageModelSource, tmp_path: Path, kill_at: int | None, written: Path
) -> None:
    def interrupt(n_rows: int) -> None:
        if n_rows > 100 and kill_at:
            raise KeyboardInterrupt

    if kill_at:
        with pytest.raises(KeyboardInterrupt):
            write_cache(tmp_path / "c", cache_source, shard_rows=50, max_tokens=250, on_progress=interrupt)
    seen: list[int] = []
    write_cache(tmp_path / "c", cache_source, shard_rows=50, max_tokens=250, on_progress=seen.append)
    assert seen.count(250) == 1
    cache = ActivationCache(tmp_path / "c", "h.1")
    assert cache.n_rows == 250
    cut, every = (
        [
            (tuple(a), g)
            for chunk, _ in c.chunks("train")
            for a, g in zip(chunk.acts["h.1"].tolist(), chunk.group.tolist())
        ]
        for c in (ActivationCache(tmp_path / "c", "h.1", 0.0), ActivationCache(written, "h.1", 0.0))
    )
    assert set(cut) <= set(every)
    last = max(group for _, group in cut)
    assert sum(group < last for _, group in every) == sum(group < last for _, group in cut)  # documents in their order


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"context_length": 8}, {}, "context_length is 16 there and 8 here"),
        ({"model": "other"}, {}, "model is 'tiny' there and 'other' here"),
        ({"hookpoint": "h.1"}, {}, r"hookpoints is \{'h.0': 16, 'h.1': 16\} there and \{'h.1': 16\} here"),
        ({"mask_special": False}, {}, "mask_special is True there and False here"),
        ({"max_norm_ratio": 4.0}, {}, "max_norm_ratio is None there and 4.0 here"),
        ({}, {"max_tokens": 9}, "max_tokens is None there and 9 here"),
        ({}, {"shard_rows": 9}, "shard_rows is 100 there and 9 here"),
        ({"forward_tokens": 64}, {"max_tokens": 9}, "forward_tokens is 32 there and 64 here; max_tokens is None there"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny: ModuleType, copy: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    before = contents(copy)
    with pytest.raises(DataError, match=f"written with other settings: {message}"):
        write_cache(
            copy,
            tiny.source(dataclasses.replace(tiny.CACHED, **changes)),
            **{"shard_rows": tiny.SHARD_ROWS} | arguments,
        )
    assert contents(copy) == before


def test_another_text_is_refused(tiny: ModuleType, copy: Path) -> None:
    with pytest.raises(DataError, match=r"dataset is 'a list of 40 texts .*' there and 'a list of 3 texts"):
        write_cache(copy, tiny.source(tiny.CACHED, open_text(tiny.DOCUMENTS[:3])), shard_rows=tiny.SHARD_ROWS)


def test_a_cache_that_version_0_1_began_is_continued(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path
) -> None:
    def interrupt(n_rows: int) -> None:
        if n_rows > 3 * tiny.SHARD_ROWS:
            raise KeyboardInterrupt

    directory = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write_cache(directory, cache_source, shard_rows=tiny.SHARD_ROWS, on_progress=interrupt)
    index = CacheIndex.read(directory)
    index.settings = {"batch_tokens" if n == "forward_tokens" else n: v for n, v in index.settings.items()}
    index.write(directory)
    assert b"forward_tokens" not in (directory / "index.json").read_bytes()
    assert index.shards
    write_cache(directory, cache_source, shard_rows=tiny.SHARD_ROWS)
    assert ActivationCache(directory, "h.0").settings == ActivationCache(written, "h.0").settings
    assert {name: data for name, data in contents(directory).items() if name != "index.json"} == {
        name: data for name, data in contents(written).items() if name != "index.json"
    }


def test_a_folder_of_other_things_is_refused_and_untouched(cache_source: LanguageModelSource, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".mine.partial").write_text("kept")
    with pytest.raises(CheckpointError, match=r"holds other files and no index\.json"):
        write_cache(tmp_path, cache_source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "thesis.txt"]
    with pytest.raises(StorageError, match="could not write"):
        write_cache(tmp_path / "thesis.txt", cache_source)


def test_too_little_and_bad_numbers_are_refused(
    tiny: ModuleType, cache_source: LanguageModelSource, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"a list of 1 texts .* gives no token to cache"):
        write_cache(tmp_path / "c", tiny.source(tiny.CACHED, open_text(["xyzzy"])))
    with pytest.raises(ConfigError, match="max_tokens: expected at least 1, got 0"):
        write_cache(tmp_path / "d", cache_source, max_tokens=0)
    assert not (tmp_path / "d").exists()


def test_writing_survives_a_kill_at_every_moment(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.source(dataclasses.replace(tiny.CACHED, hookpoint="h.0"), open_text(tiny.DOCUMENTS[:5]))
    moments = kill.survive_every_kill(
        tmp_path, monkeypatch, work=lambda root: write_cache(root / "cache", source, shard_rows=40)
    )
    assert moments > 20


def test_a_model_that_was_replaced_in_place_is_refused(tiny: ModuleType, copy: Path) -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(DataError, match=r"other settings: the model \(weights or tokenizer\) was changed since"):
        write_cache(copy, tiny.source(tiny.CACHED, model=model), shard_rows=tiny.SHARD_ROWS)


def test_a_text_changed_in_its_middle_is_refused_and_one_that_was_moved_is_not(
    tiny: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    text, other = tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"
    text.write_text("\n\n".join(tiny.DOCUMENTS))

    def write(path: Path) -> None:
        write_cache(tmp_path / "cache", tiny.source(tiny.CACHED, open_text(path)), shard_rows=tiny.SHARD_ROWS)

    write(text)
    text.parent.rename(other.parent)
    before = contents(tmp_path / "cache")
    write(other)
    assert contents(tmp_path / "cache") == before
    middle = len(other.read_bytes()) // 2
    other.write_bytes(other.read_bytes()[:middle] + b"x" + other.read_bytes()[middle + 1 :])
    with pytest.raises(DataError, match=r"dataset is .* there and .* here"):
        write(other)


def test_a_cache_that_was_begun_and_never_filled_takes_other_settings(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="gives no token to cache"):
        write_cache(tmp_path / "c", tiny.source(tiny.CACHED, open_text(["xyzzy"])))
    write_cache(tmp_path / "c", cache_source, shard_rows=tiny.SHARD_ROWS)
    assert contents(tmp_path / "c") == contents(written)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_what_bfloat16_rounds_away_is_measured_and_float32_keeps_it(
    tiny: ModuleType, tmp_path: Path, offset: float
) -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias += offset
    source = tiny.source(dataclasses.replace(tiny.CACHED, hookpoint="h.1"), model=model)
    x = torch.cat([chunk.acts["h.1"] for chunk, _ in source.chunks(None)])
    for dtype in ("bf16", "float32"):
        write_cache(tmp_path / dtype, source, dtype=dtype, shard_rows=10**6)
    rounded, whole = (ActivationCache(tmp_path / dtype, "h.1") for dtype in ("bf16", "float32"))
    assert torch.equal(whole.rows(torch.arange(len(x)))["h.1"], x)
    expected = FVU()
    expected.update(x, rounded.rows(torch.arange(len(x)))["h.1"])
    assert rounded.rounded_away == pytest.approx(expected.compute(), rel=1e-9)
    warning = existing.rounding_warning(rounded)
    assert (warning is not None and "--cache-dtype float32" in warning) == (offset > 0)
    assert existing.rounding_warning(whole) is None


def test_inputs_of_modules_are_cached_in_folders_of_any_file_system(tiny: ModuleType, tmp_path: Path) -> None:
    sites = ("h.1.mlp:in", "h.1.mlp")
    source = tiny.source(tiny.CACHED, open_text(tiny.DOCUMENTS[:8]), hookpoints=sites)
    write_cache(tmp_path / "c", source, shard_rows=60, dtype="float32")
    folders = {path.name for path in (tmp_path / "c").iterdir() if path.is_dir()}
    assert folders == {"tokens", "tokenizer", "h.1.mlp@in", "h.1.mlp"}
    assert verify_cache(tmp_path / "c")[0] > 6
    whole, _ = tiny.collect(source, None)
    cache = ActivationCache(tmp_path / "c", sites)
    rows = cache.rows(torch.arange(cache.n_rows))
    assert tuple(rows) == sites
    assert all(torch.equal(rows[site], whole.acts[site]) for site in sites)
    assert existing.held_hookpoints("transformer.h.*.mlp:in", list(cache.settings["hookpoints"])) == ["h.1.mlp:in"]
    assert existing.held_hookpoints("h.*.mlp", list(cache.settings["hookpoints"])) == ["h.1.mlp"]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_int8_and_zstd_hold_is_measured_and_goes_on_after_a_kill(
    tiny: ModuleType, cache_source: LanguageModelSource, tmp_path: Path, dtype: CacheDtype, compression: Compression
) -> None:
    def interrupt(n_rows: int) -> None:
        if n_rows > 3 * tiny.SHARD_ROWS:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"dtype": dtype, "compression": compression, "shard_rows": tiny.SHARD_ROWS}
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "killed", cache_source, on_progress=interrupt, **settings)
    for name in ("killed", "whole"):
        write_cache(tmp_path / name, cache_source, **settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    verify_cache(tmp_path / "whole")
    x = torch.cat([chunk.acts["h.1"] for chunk, _ in cache_source.chunks(None)])
    cache = ActivationCache(tmp_path / "whole", "h.1")
    held, variance = cache.rows(torch.arange(len(x)))["h.1"], 0.0
    assert held.dtype == (torch.float32 if dtype == "int8" else torch.bfloat16)
    for shard in x.split([shard.rows for shard in CacheIndex.read(tmp_path / "whole").shards]):
        variance += (shard.double() - shard.double().mean(0)).square().sum().item()
    assert cache.rounded_away == pytest.approx((x.double() - held.double()).square().sum().item() / variance, rel=1e-9)
    assert 1e-7 < cache.rounded_away < 1e-4
    assert cache.stored_as == {"bf16": "bfloat16", "int8": "int8"}[dtype] + ", compressed" * (compression == "zstd")
    with pytest.raises(DataError, match=r"other settings: .* there and .* here"):
        write_cache(tmp_path / "whole", cache_source, dtype="float32", shard_rows=tiny.SHARD_ROWS)


def test_compressed_rows_are_shuffled_as_others_are(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, tmp_path: Path
) -> None:
    write_cache(tmp_path / "c", cache_source, shard_rows=tiny.SHARD_ROWS, compression="zstd")
    caches = [ActivationCache(folder, ["h.1", "h.0"], held_out=0.3) for folder in (written, tmp_path / "c")]
    for window_rows in (10**6, 200):
        batches = [RowShuffle(cache, 64, seed=2, window_rows=window_rows, block_rows=8) for cache in caches]
        for _ in range(30):
            plain, compressed = (each.next_batch() for each in batches)
            assert all(torch.equal(plain[site], compressed[site]) for site in ("h.0", "h.1"))
    chunks = [list(cache.chunks("held_out")) for cache in caches]
    assert all(torch.equal(a.acts["h.0"], b.acts["h.0"]) for (a, _), (b, _) in zip(*chunks, strict=True))


def test_settings_of_storing_are_checked(cache_source: LanguageModelSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: expected one of bf16, float32, int8, got 'int4'"):
        write_cache(tmp_path / "c", cache_source, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compression: expected one of none, zstd, got 'gzip'"):
        write_cache(tmp_path / "c", cache_source, compression="gzip")  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()


def test_without_zstandard_nothing_is_begun(
    cache_source: LanguageModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'zstandard', .* pip install 'flashsae\[hf\]'"):
        write_cache(tmp_path / "c", cache_source, compression="zstd")
    assert not (tmp_path / "c").exists()

"""What is read from a cache is what was streamed, and a cache that is damaged is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex, shard_path, verify_cache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import RowSource
from flashsae.data.split import Split, split_mask
from flashsae.errors import CheckpointError, ConfigError, DataError, FlashSAEError
from flashsae.files.documents import crc32, sealed
from flashsae.text.open import open_text


def test_rows_and_tokens_are_those_of_the_stream_in_bfloat16(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path
) -> None:
    streamed = [chunk for chunk, _ in cache_source.chunks(None)]
    for name in ("h.0", "h.1"):
        cache = ActivationCache(written, name, held_out=0.0)
        acts = torch.cat([chunk.acts[name] for chunk in streamed]).to(torch.bfloat16)
        assert cache.n_rows == len(acts) == sum(len(document.split()) for document in tiny.DOCUMENTS)
        assert torch.equal(cache.rows(torch.arange(len(acts)))[name], acts)
        read = [chunk for chunk, _ in cache.chunks("train")]
        for field in ("group", "token_ids", "position"):
            expected = torch.cat([getattr(chunk, field) for chunk in streamed])
            got = torch.cat([getattr(chunk, field) for chunk in read])
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype
        assert torch.equal(torch.cat([chunk.acts[name] for chunk in read]), acts)


def test_rows_come_in_the_order_asked(written: Path) -> None:
    cache = ActivationCache(written, "h.1")
    everything = cache.rows(torch.arange(cache.n_rows))["h.1"]
    index = torch.randint(cache.n_rows, (333,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(cache.rows(index)["h.1"], everything[index])
    assert cache.rows(torch.empty(0, dtype=torch.int64))["h.1"].shape == (0, 16)
    assert cache.rows(index)["h.1"].dtype == torch.bfloat16
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
        assert torch.equal(torch.cat([chunk.acts["h.0"] for chunk in chunks]), cache.rows(rows)["h.0"])
        assert split_mask(torch.cat([chunk.group for chunk in chunks]), 0.3, split).all()


def test_chunks_go_on_at_a_cursor(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.data.cache._CHUNK_ROWS", 40)  # several in a shard
    cache = ActivationCache(written, "h.0")
    whole = list(cache.chunks("train"))
    assert len(whole) > 2
    rest = list(cache.chunks("train", json.loads(json.dumps(whole[1][1]))))
    assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[2:]]
    assert all(torch.equal(a.acts["h.0"], b.acts["h.0"]) for (a, _), (b, _) in zip(rest, whole[2:]))


def test_it_says_what_it_holds_and_keeps_the_tokenizer(
    tiny: ModuleType, cache_source: LanguageModelSource, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache(written, "h.1")
    assert (cache.model, cache.hookpoints, cache.d_in, cache.dataset) == ("tiny", ("h.1",), 16, cache_source.text.name)
    assert ActivationCache.is_complete(written)
    assert not ActivationCache.is_complete(written.parent)
    assert ActivationCache.read_settings(written) == cache.settings
    monkeypatch.setenv("HOME", str(written.parent))
    in_home = f"~/{written.name}"
    assert ActivationCache.is_complete(in_home)
    assert ActivationCache(in_home, "h.1").settings == ActivationCache.read_settings(in_home) == cache.settings
    assert cache.settings["hookpoints"] == {"h.0": 16, "h.1": 16}
    ids = cache_source.tokenizer(tiny.DOCUMENTS[3])["input_ids"]
    assert cache.read_tokenizer()(tiny.DOCUMENTS[3])["input_ids"] == ids


def test_rows_are_mapped_not_loaded(written: Path) -> None:
    cache = ActivationCache(written, "h.0")
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in sorted((written / "h.0").glob("*.safetensors")))
    assert len(cache.rows(torch.arange(3))["h.0"]) == 3


def reseal(directory: Path) -> None:
    """Write the checksums of the shards as they are now into the index, as if they had been written so."""
    index = CacheIndex.read(directory)
    index.shards = [
        dataclasses.replace(shard, crc32={kind: crc32(shard_path(directory, kind, number)) for kind in shard.crc32})
        for number, shard in enumerate(index.shards)
    ]
    index.write(directory)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_what_is_not_finite_is_found_by_whoever_reads_it(copy: Path, split: Split) -> None:
    bad = int(ActivationCache(copy, "h.0", held_out=0.3).split_rows(split)[1])
    shard = copy / "h.0" / "00000.safetensors"
    acts = safetensors.torch.load(shard.read_bytes())["activations"]
    acts[bad] = float("nan")
    shard.write_bytes(safetensors.torch.save({"activations": acts}))
    reseal(copy)
    cache = ActivationCache(copy, "h.0", held_out=0.3)
    with pytest.raises(DataError, match=rf"\(h\.0\), counted from row 0: 1 of \d+ rows .*first: row {bad}\)"):
        next(cache.chunks(split))
    shuffle = RowShuffle(cache, len(cache.split_rows("train")), seed=0)
    if split == "train":
        with pytest.raises(DataError, match=rf"\(h\.0\): row {bad} holds NaN or Inf"):
            shuffle.next_batch()
    else:
        assert shuffle.next_batch()["h.0"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "is something else: expected the format"),
        ({"format_version": 1}, "has format version 1, this FlashSAE reads 2"),
        ({"shards": [3]}, r"is damaged: shards\[0\]: expected an object, got 3"),
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
        shard.write_bytes(max((copy / kind).iterdir()).read_bytes())  # the last one is shorter
    else:
        damaged = {"truncated": content[:-1], "longer": content + b"!", "scrambled": b"\xff" * len(content)}
        shard.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{kind}/00001\.safetensors"):
        ActivationCache(copy, "h.0").split_rows("train")


def test_a_hookpoint_is_chosen_where_there_are_several(cache_source: LanguageModelSource, written: Path) -> None:
    for wrong in (None, "h.7"):
        with pytest.raises(ConfigError, match=r"holds h\.0, h\.1; expected one of them"):
            ActivationCache(written, wrong)
    with pytest.raises(ConfigError, match="0 <= held_out < 1"):
        ActivationCache(written, "h.0", held_out=1.0)


def test_a_cache_of_one_hookpoint_needs_no_choice(tiny: ModuleType, tmp_path: Path) -> None:
    write_cache(
        tmp_path / "c",
        tiny.source(dataclasses.replace(tiny.CACHED, hookpoint="h.1"), open_text(tiny.DOCUMENTS[:2])),
    )
    assert ActivationCache(tmp_path / "c").hookpoints == ("h.1",)


@pytest.mark.parametrize("place", ["h.0/00000.safetensors", "tokens/00001.safetensors"])
def test_a_flipped_bit_is_found_by_whoever_reads_it_and_by_verify(copy: Path, place: str) -> None:
    verify_cache(copy)
    data = bytearray((copy / place).read_bytes())
    data[-5] ^= 1
    (copy / place).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{place} is damaged: its checksum is not the one in index\.json"):
        list(ActivationCache(copy, "h.0").chunks("train"))
    with pytest.raises(CheckpointError, match=f"damaged or missing: .*{place}"):
        verify_cache(copy)
    assert list(ActivationCache(copy, "h.1").rows(torch.arange(3))["h.1"].shape) == [3, 16]


@pytest.mark.parametrize("damage", ["flip", "remove a file", "remove all", "no json"])
def test_a_damaged_tokenizer_is_one_sentence(copy: Path, damage: str) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    if damage == "flip":
        file.write_bytes(file.read_bytes().replace(b"cat", b"cot"))
    elif damage == "no json":
        file.write_text("{")
    elif damage == "remove a file":
        file.unlink()
    else:
        shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is damaged: its checksum"):
        ActivationCache(copy, "h.0").read_tokenizer()


WRONG: list[Any] = [None, "x", "../x", -1, 1.5, 10**30, True, [], [3], {}, {"a": 1}, {"../x": 16}, float("nan"), ...]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, each in items:
        yield from _paths(each, (*path, name))


def test_each_field_of_the_index_of_each_wrong_kind_is_one_sentence_or_does_no_harm(copy: Path) -> None:
    good = json.loads((copy / "index.json").read_text())
    for path in list(_paths(good)):
        for wrong, seals in itertools.product(WRONG, (sealed, dict)):
            edited = json.loads(json.dumps(good))
            place = edited
            for name in path[:-1]:
                place = place[name]
            if wrong is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            (copy / "index.json").write_text(json.dumps(seals(edited)))
            try:
                cache = ActivationCache(copy, "h.0")
                cache.rows(torch.arange(3))
                cache.split_rows("train")
            except FlashSAEError:
                continue
            assert seals is sealed or edited == good, f"{path} = {wrong!r} passes without a checksum"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "tokens", "tokenizer", "/etc"])
def test_no_name_in_an_index_leads_out_of_its_folder(copy: Path, name: str) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["settings"]["hookpoints"] = {name: 16}
    for shard in index["shards"]:
        shard["crc32"] = {"tokens": 1, name: 1}
        shard["rounding"] = {}
    (copy / "index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        ActivationCache(copy)


def test_several_hookpoints_of_a_cache_are_read_together(written: Path) -> None:
    both = ActivationCache(written, ["h.1", "h.0"], held_out=0.3)
    one, other = (ActivationCache(written, name, held_out=0.3) for name in both.hookpoints)
    assert (both.widths, list(both.widths)) == ({"h.0": 16, "h.1": 16}, ["h.1", "h.0"])
    assert torch.equal(both.split_rows("train"), one.split_rows("train"))
    index = torch.randint(both.n_rows, (333,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(both.rows(index)["h.1"], one.rows(index)["h.1"])
    assert torch.equal(both.rows(index)["h.0"], other.rows(index)["h.0"])
    for (chunk, cursor), (mine, behind), (yours, _) in zip(
        both.chunks("train"), one.chunks("train"), other.chunks("train"), strict=True
    ):
        assert cursor == behind
        assert torch.equal(chunk.group, mine.group)
        assert chunk.acts.keys() == both.widths.keys()
        assert torch.equal(chunk.acts["h.1"], mine.acts["h.1"])
        assert torch.equal(chunk.acts["h.0"], yours.acts["h.0"])
    assert ActivationCache(written, ["h.1:out", "h.1"], 0.3).identity == one.identity
    assert len({str(cache.identity) for cache in (both, one, other)}) == 3
    assert both.rounded_away == max(one.rounded_away, other.rounded_away)
    batches = RowShuffle(both, 64, seed=2), RowShuffle(one, 64, seed=2)
    for _ in range(30):
        batch, expected = (each.next_batch() for each in batches)
        assert torch.equal(batch["h.1"], expected["h.1"])
    for wrong in ([], ["h.0", "h.7"]):
        with pytest.raises(ConfigError, match=r"holds h\.0, h\.1; expected one of them, got (None|'h\.7')"):
            ActivationCache(written, wrong)


def test_a_damaged_shard_of_any_site_is_found(copy: Path) -> None:
    shard = copy / "h.0" / "00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"h\.0/00001\.safetensors is damaged"):
        list(ActivationCache(copy, ["h.1", "h.0"]).chunks("train"))


def test_a_cache_is_read_by_its_format_alone(tmp_path: Path) -> None:
    """The files of format 2 as they are documented, written by hand."""
    acts = torch.arange(24.0).reshape(6, 4).bfloat16()
    tokens = {
        "token_ids": torch.arange(6, dtype=torch.int32),
        "group": torch.arange(6) // 2,
        "position": torch.arange(6, dtype=torch.int32) % 2,
    }
    sums = {}
    for kind, tensors in (("tokens", tokens), ("h.1", {"activations": acts})):
        file = tmp_path / kind / "00000.safetensors"
        file.parent.mkdir()
        file.write_bytes(safetensors.torch.save(tensors))
        sums[kind] = crc32(file)
    settings = {
        "model": "m", "dataset": "d", "model_fingerprint": "", "text_fingerprint": "", "hookpoints": {"h.1": 4},
        "dtype": "bfloat16", "context_length": 8, "mask_special": True, "max_norm_ratio": None,
    }  # fmt: skip
    head = {"format": "flashsae.activations", "format_version": 2, "flashsae_version": "0.1.0"}
    shard = {"rows": 6, "crc32": sums, "rounding": {}}
    index = head | {"settings": settings, "shards": [shard], "cursor": None, "complete": True, "tokenizer": None}
    (tmp_path / "index.json").write_text(json.dumps(sealed(index)))
    cache = ActivationCache(tmp_path, held_out=0.0)
    assert torch.equal(cache.rows(torch.tensor([5, 0]))["h.1"], acts[[5, 0]])
    assert torch.equal(next(cache.chunks("train"))[0].group, tokens["group"])


def test_a_cache_that_is_moved_or_removed_is_read_on(copy: Path, written: Path) -> None:
    cache, expected = (ActivationCache(folder, "h.0", held_out=0.3) for folder in (copy, written))
    assert torch.equal(cache.split_rows("train"), expected.split_rows("train"))
    shutil.rmtree(copy)
    for split in ("train", "held_out"):
        for (a, _), (b, _) in zip(cache.chunks(split), expected.chunks(split), strict=True):
            assert torch.equal(a.acts["h.0"], b.acts["h.0"])
            assert torch.equal(a.group, b.group)


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"dtype": "float32"}, {"cache_compression": "zstd"}])
def test_shards_that_are_stored_otherwise_than_the_index_says_are_refused(copy: Path, change: dict[str, str]) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["settings"] |= change
    (copy / "index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(CheckpointError, match=r"cannot read the shard .*h\.0/00000\.safetensors: "):
        ActivationCache(copy, "h.0")

"""A cache is extended to the bytes of one written at once, and whoever reads it meanwhile keeps what it opened."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex, verify_cache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import RowShuffle
from flashsae.errors import CheckpointError, DataError
from flashsae.files.documents import sealed
from flashsae.text.open import open_text
from helpers import kill

SHARD_ROWS = 40


@pytest.fixture(scope="module")
def source(tiny: ModuleType) -> LanguageModelSource:
    """Some inputs of it have no token that is kept, and blocks are of some shards."""
    config = replace(tiny.CACHED, hookpoint="h.0", context_length=8, forward_tokens=8, exclude_ids=(5, 9))
    made: LanguageModelSource = tiny.source(config, open_text(tiny.DOCUMENTS[:16]))
    return made


@pytest.fixture(scope="module")
def at_once(source: LanguageModelSource, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, dict[str, Any]]:
    """The bytes of caches of all sizes, written at once."""
    folder = tmp_path_factory.mktemp("at-once")
    sizes = (1, 39, 40, 41, 130, 131, 200, 10**6, None)
    for size in sizes:
        write_cache(folder / str(size), source, shard_rows=SHARD_ROWS, max_tokens=size)
    return {size: kill.contents(folder / str(size)) for size in sizes}


def put(folder: Path, contents: dict[str, Any]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def test_it_ends_with_the_bytes_of_one_written_at_once(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path
) -> None:
    for short, long in pairwise(at_once):
        extended = put(tmp_path / f"{short} to {long}", at_once[short])
        write_cache(extended, source, shard_rows=SHARD_ROWS, max_tokens=long)
        assert kill.contents(extended) == at_once[long], (short, long)
    step_by_step = tmp_path / "steps"
    for size in at_once:
        write_cache(step_by_step, source, shard_rows=SHARD_ROWS, max_tokens=size)
    assert kill.contents(step_by_step) == at_once[None]
    assert verify_cache(step_by_step)


def test_what_a_norm_filter_drops_is_not_taken_for_the_end_of_the_text(
    tiny: ModuleType, source: LanguageModelSource, tmp_path: Path
) -> None:
    """A block that is cut has then less than was asked for: the next one is read in its place, if there is one."""
    filtered = tiny.source(replace(source.config, max_norm_ratio=1.05, forward_tokens=16), source.text)
    write_cache(tmp_path / "all", filtered, shard_rows=SHARD_ROWS)
    rows = CacheIndex.read(tmp_path / "all").rows
    step_by_step = tmp_path / "steps"
    for size in (30, 90, rows - 9, rows, None):
        once = tmp_path / f"{size} at once"
        write_cache(once, filtered, shard_rows=SHARD_ROWS, max_tokens=size)

        def stop(n_rows: int, size: int | None = size) -> None:
            if n_rows > (size or rows) - 9:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            write_cache(step_by_step, filtered, shard_rows=SHARD_ROWS, max_tokens=size, on_progress=stop)
        write_cache(step_by_step, filtered, shard_rows=SHARD_ROWS, max_tokens=size)
        assert kill.contents(step_by_step) == kill.contents(once), size
    assert kill.contents(step_by_step) == kill.contents(tmp_path / "all")


def test_what_lies_before_the_cut_is_not_read_again(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path
) -> None:
    cache = put(tmp_path / "cache", at_once[200])
    seen: list[int] = []
    write_cache(cache, source, shard_rows=SHARD_ROWS, max_tokens=10**6, on_progress=seen.append)
    assert seen[0] > 60
    ended = put(tmp_path / "ended", at_once[10**6])  # all of the text is there already
    write_cache(ended, source, shard_rows=SHARD_ROWS, on_progress=lambda n: pytest.fail("the model ran"))
    assert kill.contents(ended) == at_once[None]


def test_a_kill_while_it_is_extended_costs_nothing(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = kill.survive_every_kill(
        tmp_path,
        monkeypatch,
        prepare=lambda root: put(root / "cache", at_once[41]),
        work=lambda root: write_cache(root / "cache", source, shard_rows=SHARD_ROWS, max_tokens=130),
    )
    assert moments > 20
    assert kill.contents(tmp_path / "whole" / "cache") == at_once[130]


def test_a_cache_that_is_not_complete_is_extended_too(source: LanguageModelSource, tmp_path: Path) -> None:
    write_cache(tmp_path / "whole", source, shard_rows=10)
    for size in (90, 130):  # stopped in the block that is cut

        def stop(n_rows: int, last: int = size - 4) -> None:
            if n_rows > last:
                raise KeyboardInterrupt

        cache = tmp_path / str(size)
        with pytest.raises(KeyboardInterrupt):
            write_cache(cache, source, shard_rows=10, max_tokens=size, on_progress=stop)
        write_cache(cache, source, shard_rows=10)
        assert kill.contents(cache) == kill.contents(tmp_path / "whole")


def test_fewer_tokens_and_other_settings_are_refused_as_before(
    tiny: ModuleType, source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path
) -> None:
    cache = put(tmp_path / "cache", at_once[130])
    with pytest.raises(DataError, match="max_tokens is 130 there and 41 here"):
        write_cache(cache, source, shard_rows=SHARD_ROWS, max_tokens=41)
    other = tiny.source(replace(source.config, exclude_ids=()), source.text)
    with pytest.raises(
        DataError, match=r"exclude_ids is \[5, 9\] there and \[\] here; max_tokens is 130 there and 200"
    ):
        write_cache(cache, other, shard_rows=SHARD_ROWS, max_tokens=200)
    write_cache(put(tmp_path / "all", at_once[None]), source, shard_rows=SHARD_ROWS)
    with pytest.raises(DataError, match="max_tokens is None there and 200 here"):
        write_cache(tmp_path / "all", source, shard_rows=SHARD_ROWS, max_tokens=200)
    assert kill.contents(cache) == at_once[130]


def test_a_cache_without_marks_as_version_0_1_wrote_them_is_read_and_not_extended(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path
) -> None:
    cache = put(tmp_path / "cache", at_once[130])
    index = json.loads((cache / "index.json").read_text())
    del index["marks"]
    (cache / "index.json").write_text(json.dumps(sealed(index)))
    assert ActivationCache(cache).n_rows == 130
    with pytest.raises(DataError, match="max_tokens is 130 there and 200 here"):
        write_cache(cache, source, shard_rows=SHARD_ROWS, max_tokens=200)


@pytest.mark.parametrize("marks", [[], [{"shards": 9999, "cursor": {}}], [{"shards": 1, "cursor": {}}] * 2])
def test_marks_of_other_shards_are_refused(marks: list[Any], at_once: dict[int | None, Any], tmp_path: Path) -> None:
    cache = put(tmp_path / "cache", at_once[130])
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(sealed(index | {"marks": marks})))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: its marks are those of other shards"):
        CacheIndex.read(cache)


def test_a_reader_keeps_what_it_opened(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path
) -> None:
    short = put(tmp_path / "short", at_once[130])
    cache = put(tmp_path / "cache", at_once[130])
    opened, expected = ActivationCache(cache, held_out=0.3), ActivationCache(short, held_out=0.3)
    write_cache(cache, source, shard_rows=SHARD_ROWS)
    assert ActivationCache(cache).n_rows > opened.n_rows == 130
    assert opened.identity == expected.identity
    for split in ("train", "held_out"):
        assert torch.equal(opened.split_rows(split), expected.split_rows(split))
        for (a, _), (b, _) in zip(opened.chunks(split), expected.chunks(split), strict=True):
            assert torch.equal(a.acts["h.0"], b.acts["h.0"])
            assert torch.equal(a.group, b.group)
    resumed = RowShuffle(ActivationCache(cache, held_out=0.3), 32, seed=0)
    with pytest.raises(CheckpointError, match=r"training rows now, \d+ when the checkpoint was written"):
        resumed.restore(RowShuffle(expected, 32, seed=0).state())


READER = """
import sys, hashlib
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
cache = ActivationCache(sys.argv[1], held_out=0.3)
shuffle = RowShuffle(cache, 32, seed=7)
digest = hashlib.sha256()
print("open", flush=True)
sys.stdin.readline()
for _ in range(20):
    digest.update(shuffle.next_batch()["h.0"].float().numpy().tobytes())
for chunk, _ in cache.chunks("held_out"):
    digest.update(chunk.group.numpy().tobytes())
print(digest.hexdigest())
"""


def test_processes_train_from_a_cache_while_another_extends_it(
    source: LanguageModelSource,
    at_once: dict[int | None, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = put(tmp_path / "cache", at_once[130])
    monkeypatch.setattr(sys, "argv", ["", str(cache)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("go"))
    exec(READER, {})
    alone = capsys.readouterr().out.splitlines()[1]
    command = [sys.executable, "-c", READER, str(cache)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.stdout.readline() for each in readers if each.stdout] == ["open\n", "open\n"]
    write_cache(cache, source, shard_rows=SHARD_ROWS)
    assert [each.communicate("go\n")[0].strip() for each in readers] == [alone, alone]


def test_reading_locks_and_changes_nothing_on_the_disk(
    source: LanguageModelSource, at_once: dict[int | None, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashsae.files.atomic import only_one

    cache = put(tmp_path / "cache", at_once[130])
    with kill.killed(tmp_path, 0, monkeypatch):  # any change would raise
        write_cache(cache, source, shard_rows=SHARD_ROWS, max_tokens=130)  # complete: as a run does that finds it
        with only_one(cache):  # as a writer has it
            opened = ActivationCache(cache)
            assert len(opened.rows(torch.arange(130))["h.0"]) == len(torch.cat([opened.split_rows("train")])) + len(
                opened.split_rows("held_out")
            )
            opened.read_tokenizer()

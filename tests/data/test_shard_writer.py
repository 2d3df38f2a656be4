"""Shards that threads write: the same bytes, whatever runs ahead, and an error is told."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from flashsae.data import shard_writer
from flashsae.data.cache_writer import write_cache
from flashsae.data.shard_writer import ShardWriter, parts_of_file, parts_of_rows
from flashsae.errors import StorageError


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def behind(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Let the writer lag as it does behind a GPU."""
    add = ShardWriter._collect
    monkeypatch.setattr(ShardWriter, "_collect", lambda self, most: add(self, shards if most == 0 and shards else most))
    finish = ShardWriter.finish

    def at_the_end(self: ShardWriter) -> None:
        monkeypatch.setattr(ShardWriter, "_collect", add)
        finish(self)

    monkeypatch.setattr(ShardWriter, "finish", at_the_end)


@pytest.mark.parametrize("dtype", ["bf16", "float32", "int8"])
def test_shards_that_lag_are_the_same(
    tiny: ModuleType, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "one", tiny.source(tiny.CACHED), shard_rows=50, dtype=dtype)
    behind(monkeypatch, 3)
    write_cache(tmp_path / "other", tiny.source(tiny.CACHED), shard_rows=50, dtype=dtype)
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert len(one) > 12
    assert one == other


def test_an_error_of_a_thread_is_raised_and_what_was_written_before_it_counts(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "whole", tiny.source(tiny.CACHED), shard_rows=50)
    write = shard_writer.write_atomic

    def refuse(path: Path, content: object) -> None:
        if path.name.startswith("00002"):
            raise StorageError("the disk is full")
        write(path, content)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_atomic", refuse)
        behind(patch, 3)
        with pytest.raises(StorageError, match="the disk is full"):
            write_cache(tmp_path / "cut", tiny.source(tiny.CACHED), shard_rows=50)
    write_cache(tmp_path / "cut", tiny.source(tiny.CACHED), shard_rows=50)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 17), (10000, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_is_what_safetensors_writes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert b"".join(parts_of_rows("activations", [x[:2], x[2:2], x[2:]])) == safetensors.torch.save({"activations": x})
    assert b"".join(parts_of_file({"activations": x})) == safetensors.torch.save({"activations": x})
    assert b"".join(parts_of_file({"activations": x.T})) == safetensors.torch.save({"activations": x.T.contiguous()})
    several = {"b": x, "a": torch.arange(3)}
    assert b"".join(parts_of_file(several)) == safetensors.torch.save(several)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_activations_of_a_gpu_are_cached_as_they_are(tiny: ModuleType, tmp_path: Path, dtype: str) -> None:
    from flashsae.data.cache import ActivationCache

    source = tiny.source(tiny.CACHED, model=tiny.gpt2().cuda())
    write_cache(tmp_path / "cache", source, shard_rows=50, dtype=dtype)
    chunks = [chunk for chunk, _ in source.chunks(None)]
    for name in source.hookpoints:
        cache = ActivationCache(tmp_path / "cache", name)
        found = cache.rows(torch.arange(cache.n_rows))[name]
        assert torch.equal(found, torch.cat([chunk.acts[name] for chunk in chunks]).cpu().to(found.dtype))

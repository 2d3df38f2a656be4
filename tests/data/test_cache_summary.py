"""What is told of a cache is what was put into it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from flashsae.data import acts_shape, cache_summary
from flashsae.data.cache_index import CacheIndex, Rounding, Shard, shard_path
from flashsae.data.cache_summary import summarise
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import CheckpointError
from flashsae.files.documents import crc32
from flashsae.metrics import FVU

D = 96


def made(folder: Path, x: Tensor, dtype: str = "float32", *, shard_rows: int = 700, length: int = 16) -> Path:
    """Write a cache of these activations: documents of one input each, of so many tokens whose ids are positions."""
    settings = {
        "model": "m", "dataset": "d", "model_fingerprint": "", "text_fingerprint": "", "hookpoints": {"h": x.shape[1]},
        "dtype": dtype, "context_length": length, "mask_special": True, "max_norm_ratio": None,
    }  # fmt: skip
    index = CacheIndex(settings, [], None, True)
    layout = index.layout("h")
    rows = torch.arange(len(x))
    tokens = {"token_ids": (rows % length).int(), "group": rows // length, "position": (rows % length).int()}
    for kind in ("tokens", "h"):
        (folder / kind).mkdir(parents=True)
    for number, start in enumerate(range(0, len(x), shard_rows)):
        part = slice(start, start + shard_rows)
        kinds = {"tokens": {name: each[part] for name, each in tokens.items()}, "h": layout.store(x[part])}
        sums = {}
        for kind, tensors in kinds.items():
            path = shard_path(folder, kind, number)
            path.write_bytes(safetensors.torch.save(tensors))
            sums[kind] = crc32(path)
        index.shards.append(Shard(len(x[part]), sums, {"h": Rounding(1.0, 1e4)}))
    index.write(folder)
    return folder


def normal(n: int = 3000) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0))


def test_sizes_and_origin(cache_source: LanguageModelSource, written: Path) -> None:
    summary = summarise(written)
    files = [path for path in written.rglob("*") if path.is_file()]
    assert summary.size == sum(path.stat().st_size for path in files)
    assert (summary.is_complete, summary.rows, summary.documents) == (True, CacheIndex.read(written).rows, 40)
    assert (summary.dtype, summary.compression, summary.model) == ("bfloat16", "none", "tiny")
    assert summary.texts == [cache_source.text.name]
    assert [(site.hookpoint, site.width) for site in summary.sites] == [("h.0", 16), ("h.1", 16)]
    for site in summary.sites:
        assert site.sample_rows == summary.rows
        assert site.size == sum(path.stat().st_size for path in (written / site.hookpoint).iterdir())
        assert site.shape is not None
        assert site.rounds_away["bfloat16"] == CacheIndex.read(written).rounded_away(site.hookpoint)


def test_what_activations_look_like(tmp_path: Path) -> None:
    x = normal()
    x[:, 5] = x[:, 5] * 50 + 20
    x[:, 7] = 3.0
    x[:, 9] = 0.0
    x[::16] *= 40  # at the first position
    site = summarise(made(tmp_path / "c", x)).sites[0]
    shape = site.shape
    assert shape is not None
    norms = x.double().norm(dim=1)
    assert shape.norm == pytest.approx(norms.median().item())
    assert (shape.mean_norm, shape.largest_norm) == pytest.approx((norms.mean().item(), norms.max().item()))
    mean, square = x.double().mean(0), x.double().square().mean(0)
    assert shape.mean_share == pytest.approx((mean.square().sum() / square.sum()).item())
    assert shape.variance == pytest.approx((square - mean.square()).sum().item())
    assert shape.constant_dimensions == 1  # the other one is larger at the first position
    assert shape.n_outlier_dimensions == len(shape.outlier_dimensions) == 1
    largest = shape.outlier_dimensions[0]
    assert (largest.dimension, largest.share) == (5, pytest.approx((square[5] / square.sum()).item()))
    assert largest.mean_share == pytest.approx((mean[5] ** 2 / square[5]).item())
    assert shape.outlier_tokens.rows == int((norms > 10 * norms.median()).sum()) > 0
    assert shape.outlier_tokens.commonest[0][0] == 0
    assert [(each.first, each.last) for each in shape.positions] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15)]
    assert shape.positions[0].ratio > 20
    assert all(0.7 < each.ratio < 1.4 for each in shape.positions[1:])
    assert sum(each.rows for each in shape.positions) == site.sample_rows == len(x)


def test_dimensions_are_counted_without_the_bias_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acts_shape, "_GRAM_ROWS", 400)
    flat = summarise(made(tmp_path / "flat", normal())).sites[0].shape
    assert flat is not None
    assert flat.effective_dimensions == pytest.approx(D, rel=0.05)
    basis = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(basis.T)[0].T
    thin = summarise(made(tmp_path / "thin", normal()[:, :5] @ basis + 7)).sites[0].shape
    assert thin is not None
    assert thin.effective_dimensions == pytest.approx(5, rel=0.05)
    few = summarise(made(tmp_path / "few", normal(20))).sites[0].shape
    assert few is not None
    assert few.effective_dimensions is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_what_is_rounded_away_is_told_where_it_can_be_known(dtype: str, tmp_path: Path) -> None:
    x = normal(640)
    site = summarise(made(tmp_path / "c", x, dtype, shard_rows=640)).sites[0]
    if dtype == "int8":
        assert site.rounds_away == {"int8": 1e-4}
        return
    layout = CacheIndex(
        {"hookpoints": {"h": D}, "dtype": "int8"}  # what the sample would be in int8
    ).layout("h")
    held = x.bfloat16().float() if dtype == "bfloat16" else x
    expected = FVU()
    expected.update(held, layout.restore(layout.store(held)))
    assert site.rounds_away == {"bfloat16": 1e-4, "int8": pytest.approx(expected.compute(), rel=1e-4)}


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    x = normal(640)
    x[[3, 9], 4] = torch.tensor([torch.nan, torch.inf])
    site = summarise(made(tmp_path / "c", x)).sites[0]
    assert (site.sample_rows, site.not_finite_rows) == (640, 2)
    assert site.shape is not None
    kept = torch.ones(640, dtype=torch.bool)
    kept[[3, 9]] = False
    assert site.shape.mean_norm == pytest.approx(x[kept].double().norm(dim=1).mean().item())
    nothing = summarise(made(tmp_path / "nothing", torch.full((10, 3), torch.nan))).sites[0]
    assert (nothing.not_finite_rows, nothing.shape) == (10, None)


def test_zeros_and_one_row_are_told_without_a_fault(tmp_path: Path) -> None:
    for name, x in {"zeros": torch.zeros(200, 3), "one": torch.ones(1, 1), "sparse": torch.eye(70)}.items():
        shape = summarise(made(tmp_path / name, x)).sites[0].shape
        assert shape is not None
        assert shape.norm == (0.0 if name == "zeros" else 1.0)


def test_a_sample_is_bounded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_summary, "_SAMPLE_ROWS", 512)
    monkeypatch.setattr(cache_summary, "_SAMPLE_SHARDS", 3)
    x = normal(6000) * torch.linspace(1, 3, 6000)[:, None]
    summary = summarise(made(tmp_path / "c", x, shard_rows=1000))
    assert 300 < summary.sites[0].sample_rows <= 512
    assert (summary.rows, summary.documents) == (6000, 375)
    assert summary.sites[0].shape is not None
    assert summary.sites[0].shape.mean_norm == pytest.approx(x.norm(dim=1).mean().item(), rel=0.1)


def test_a_cache_that_is_not_complete_is_told_as_far_as_it_is(
    tiny: ModuleType, cache_source: LanguageModelSource, tmp_path: Path
) -> None:
    def stop(at: int) -> Any:
        def interrupt(n_rows: int) -> None:
            if n_rows > at:
                raise KeyboardInterrupt

        return interrupt

    for at in (250, 1):
        with pytest.raises(KeyboardInterrupt):
            write_cache(tmp_path / str(at), cache_source, shard_rows=100, on_progress=stop(at))
    some, none = summarise(tmp_path / "250"), summarise(tmp_path / "1")
    assert not some.is_complete
    assert some.rows == some.sites[1].sample_rows >= 200
    assert some.sites[0].shape is not None
    assert (none.rows, none.documents, none.sites[0].shape) == (0, 0, None)


def test_damage_where_it_is_looked_at_is_refused(copy: Path) -> None:
    shard = copy / "h.1" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"h\.1/00000\.safetensors is damaged: its checksum"):
        summarise(copy)


def test_a_summary_is_json(written: Path) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(summarise(written))))["rows"] > 0

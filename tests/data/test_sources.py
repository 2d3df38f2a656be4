from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashsae.data.acts import check_finite
from flashsae.data.sources import ArraySource, IterableSource, RowSource
from flashsae.data.split import split_mask
from flashsae.errors import ConfigError, DataError, DtypeError, ShapeError


def test_the_splits_are_disjoint_complete_and_of_the_asked_size() -> None:
    group = torch.arange(200_000)
    held_out = split_mask(group, 0.05, "held_out")
    assert torch.equal(~held_out, split_mask(group, 0.05, "train"))
    assert held_out.double().mean().item() == pytest.approx(0.05, abs=0.002)
    assert not split_mask(group, 0.0, "held_out").any()
    # neighbours are not alike, and more of them are held out when more are asked for
    assert held_out.view(-1, 100).sum(1).double().std().item() == pytest.approx((100 * 0.05 * 0.95) ** 0.5, rel=0.1)
    assert bool((held_out <= split_mask(group, 0.1, "held_out")).all())


def test_a_group_keeps_its_split_in_any_company() -> None:
    group = torch.tensor([5, 5, 17, 5, 99])
    alone = torch.cat([split_mask(g[None], 0.5, "train") for g in group])
    assert torch.equal(split_mask(group, 0.5, "train"), alone)


def test_array_source_reads_rows_and_chunks(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for array in (x, torch.from_numpy(x), mapped):
        source = ArraySource(array, held_out=0.1)
        assert isinstance(source, RowSource)
        assert source.d_in == 3
        train, held_out = source.split_rows("train"), source.split_rows("held_out")
        assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(20_000))
        index = torch.tensor([19_999, 0, 7, 7])
        assert np.array_equal(source.rows(index)["x"].numpy(), x[index.numpy()])
        chunks = list(source.chunks("held_out"))
        assert torch.equal(torch.cat([chunk.group for chunk, _ in chunks]), held_out)
        assert np.array_equal(torch.cat([chunk.acts["x"] for chunk, _ in chunks]).numpy(), x[held_out.numpy()])
        _, cursor = chunks[0]
        rest = torch.cat([chunk.acts["x"] for chunk, _ in source.chunks("held_out", cursor)])
        assert np.array_equal(rest.numpy(), torch.cat([chunk.acts["x"] for chunk, _ in chunks[1:]]).numpy())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3), ShapeError, r"x: expected the shape \[tokens, d_in\], got \[3\]"),
        (torch.zeros(3), ShapeError, r"Make one tensor of rows: torch\.stack\(rows\)"),
        (torch.zeros(2, 3, 4), ShapeError, r"got \[2, 3, 4\]\. Flatten it: x\.flatten\(0, -2\)"),
        (torch.zeros(3, 0), ShapeError, r"x: expected the shape \[tokens, d_in\], got \[3, 0\]"),
        (torch.zeros(0, 3), DataError, "x is empty: expected at least one row"),
        (torch.zeros(3, 3, dtype=torch.int32), DtypeError, r"x: expected float32, .* got torch\.int32"),
        (np.zeros((3, 3), dtype="int64"), DtypeError, "x: expected a float array, got int64"),
        ([[1.0, 2.0]], DtypeError, "x: expected a tensor, a numpy array or an iterable of such, got list"),
    ],
)
def test_bad_arrays_are_named(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ArraySource(x)  # type: ignore[arg-type]


def test_held_out_is_a_fraction() -> None:
    for fraction in (-0.1, 1.0, 5):
        with pytest.raises(ConfigError, match="held_out is a fraction of the data: expected 0 <= held_out < 1"):
            ArraySource(torch.zeros(3, 3), held_out=fraction)


def test_a_generator_loses_nothing_and_is_read_once() -> None:
    batches = [torch.full((2, 3), float(i)) for i in range(4)]
    source = IterableSource(batch for batch in batches)
    assert source.d_in == 3
    assert torch.equal(torch.cat([chunk.acts["x"] for chunk, _ in source.chunks("train")]), torch.cat(batches))
    assert list(source.chunks("train")) == []


def test_a_list_is_read_once_an_epoch_and_from_a_cursor() -> None:
    batches = [torch.full((2, 3), float(i)) for i in range(4)]
    source = IterableSource(batches)
    for _ in range(2):
        chunks = list(source.chunks("train"))
        assert torch.equal(torch.cat([chunk.acts["x"] for chunk, _ in chunks]), torch.cat(batches))
        assert torch.cat([chunk.group for chunk, _ in chunks]).tolist() == list(range(8))
    rest = [chunk.acts["x"] for chunk, _ in source.chunks("train", chunks[1][1])]
    assert torch.equal(torch.cat(rest), torch.cat(batches[2:]))


def test_bad_batches_are_named() -> None:
    with pytest.raises(DataError, match="the iterable x is empty"):
        IterableSource([])
    with pytest.raises(ShapeError, match=r"a batch of the iterable x: expected the shape \[tokens, d_in\]"):
        IterableSource([torch.zeros(3)])
    source = IterableSource([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ShapeError, match=r"batch 1 of the iterable x: expected \[tokens, 3\], got \[2, 4\]"):
        list(source.chunks("train"))


def test_check_finite_counts_and_places() -> None:
    acts = torch.zeros(5, 2)
    check_finite(acts, "here")
    acts[3, 1], acts[4, 0] = torch.inf, torch.nan
    with pytest.raises(DataError, match=r"here: 2 of 5 rows hold NaN or Inf \(first: row 3\)"):
        check_finite(acts, "here")


def test_arrays_of_several_sites_are_read_together() -> None:
    x = np.random.default_rng(0).standard_normal((9000, 3)).astype("float32")
    y = torch.from_numpy(x).double().repeat(1, 2) + 1
    source = ArraySource({"y": y, "x": x}, held_out=0.1)
    assert isinstance(source, RowSource)
    assert list(source.widths.items()) == [("y", 6), ("x", 3)]
    alone = ArraySource(x, held_out=0.1)
    assert torch.equal(source.split_rows("train"), alone.split_rows("train"))
    index = torch.tensor([8999, 0, 7, 7])
    batch = source.rows(index)
    assert list(batch) == ["y", "x"]
    assert torch.equal(batch["x"], alone.rows(index)["x"])
    assert torch.equal(batch["y"], y[index])
    for (chunk, cursor), (expected, behind) in zip(source.chunks("held_out"), alone.chunks("held_out"), strict=True):
        assert cursor == behind
        assert torch.equal(chunk.acts["x"], expected.acts["x"])
        assert torch.equal(chunk.acts["y"], y[chunk.group])
    assert source.identity != ArraySource({"x": x, "y": y}, held_out=0.1).identity
    assert source.identity != ArraySource({"y": y + 1, "x": x}, held_out=0.1).identity
    with pytest.raises(ConfigError, match=r"expected activations of exactly one site here, got y, x\. Choose one\."):
        _ = source.d_in


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)}, ShapeError, "same tokens at every site, got 3 at a, 4 at b"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(3)}, ShapeError, r"x\['b'\]: expected the shape"),
        ({"a": torch.zeros(3, 2), "b": [1.0]}, DtypeError, r"x\['b'\]: expected a tensor, a numpy array"),
        ({"a": torch.zeros(0, 2), "b": torch.zeros(0, 2)}, DataError, "x is empty"),
        ({}, DataError, "x is empty"),
    ],
)
def test_sites_that_do_not_belong_together_are_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ArraySource(x)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_sites_lie_on_one_device() -> None:
    with pytest.raises(DtypeError, match=r"every site on one device, got a on cpu, b on cuda:0\. Move them"):
        ArraySource({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2, device="cuda")})


def _dicts(n: int = 4) -> list[dict[str, Any]]:
    return [
        {"ids": torch.arange(2), "out": torch.full((2, 5), -float(i)), "in": np.full((2, 3), float(i))}
        for i in range(n)
    ]


def test_an_iterable_gives_the_sites_that_are_asked_for() -> None:
    source = IterableSource(_dicts(), sites=("in", "out"))
    assert list(source.widths.items()) == [("in", 3), ("out", 5)]
    assert source.row_bytes == 3 * 8 + 5 * 4
    for _ in range(2):
        chunks = [chunk for chunk, _ in source.chunks("train")]
        assert [list(chunk.acts) for chunk in chunks] == [["in", "out"]] * 4
        for number, chunk in enumerate(chunks):
            assert torch.equal(chunk.acts["out"], torch.full((2, 5), -float(number)))
            assert torch.equal(chunk.acts["in"], torch.full((2, 3), float(number), dtype=torch.float64))
    one = IterableSource([{"acts": torch.zeros(2, 3)}])
    assert one.widths == {"x": 3}


def test_batches_without_their_sites_are_named() -> None:
    for wrong, got in (([torch.zeros(2, 3)], "got Tensor"), (_dicts(), "got a dict of ids, out, in")):
        with pytest.raises(DtypeError, match=f"a batch of the iterable x: expected a dict of in, there, {got}"):
            IterableSource(wrong, sites=("in", "there"))
    with pytest.raises(DtypeError, match="expected one tensor, got a dict of ids, out, in"):
        IterableSource(_dicts())
    short = [*_dicts(2), {"in": np.zeros((2, 3)), "out": torch.zeros(1, 5)}]
    with pytest.raises(ShapeError, match="expected the same tokens at every site, got 2 at in, 1 at out"):
        list(IterableSource(short, sites=("in", "out")).chunks("train"))
    wide = [*_dicts(2), {"in": np.zeros((2, 3)), "out": torch.zeros(2, 6)}]
    with pytest.raises(ShapeError, match=r"batch 2 of the iterable x at out: expected \[tokens, 5\], got \[2, 6\]"):
        list(IterableSource(wide, sites=("in", "out")).chunks("train"))
    other = [*_dicts(2), {"in": np.zeros((2, 3), "float32"), "out": torch.zeros(2, 5)}]
    with pytest.raises(DtypeError, match=r"batch 2 of the iterable x at in: expected torch\.float64 on cpu"):
        list(IterableSource(other, sites=("in", "out")).chunks("train"))

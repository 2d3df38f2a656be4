"""Dot products of tokens with gathered rows: on a CUDA device compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.decode import launch
from flashsae.ops.decode.launch import launch_dots
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.on_both import DEVICE

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def _lists(B: int, k: int, n: int, generator: torch.Generator, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(n, (B, k), generator=generator).sort(1).values.to(dtype)


def _exact(rows: Tensor, latents: Tensor, W: Tensor, dtype: torch.dtype = F64) -> Tensor:
    gathered = W.to(dtype)[latents.long()]
    return torch.einsum("bd,bkd->bk", rows.to(dtype), gathered)


def _on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows_dtype", "weights_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(
    ("B", "k", "n", "d"), [(0, 3, 5, 4), (1, 1, 1, 1), (3, 0, 5, 4), (7, 5, 30, 13), (2, 37, 90, 301), (3, 16, 40, 256)]
)
def test_t0_integers_are_bitwise_equal(
    B: int, k: int, n: int, d: int, rows_dtype: torch.dtype, weights_dtype: torch.dtype, index_dtype: torch.dtype,
    generator: torch.Generator,
) -> None:  # fmt: skip
    rows = integer_inputs(B, d, generator=generator, dtype=rows_dtype)
    W = integer_inputs(n, d, generator=generator, dtype=weights_dtype)
    latents = _lists(B, k, n, generator, index_dtype)
    with poison_empty():
        dots = launch_dots(*_on_device(rows, latents, W))
    assert dots.dtype == F32
    assert torch.equal(dots.cpu(), _exact(rows, latents, W, F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("d", [20, 300])
def test_only_what_is_counted_is_computed(d: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    k, n = 40, 60
    counts = torch.tensor([0, 1, 16, 17, k, k + 1, 2**30], dtype=torch.int32)  # above k: the list is incomplete
    B = len(counts)
    rows = integer_inputs(B, d, generator=generator, dtype=dtype)
    W = integer_inputs(n, d, generator=generator, dtype=dtype)
    latents = _lists(B, k, n, generator)
    used = torch.arange(k) < torch.where(counts > k, 0, counts)[:, None]
    listed = torch.where(used, latents, 2**31 - 1)  # what is behind the end must not be read
    with poison_empty():
        dots = launch_dots(*_on_device(rows, listed, W), counts=counts.to(DEVICE)).cpu()
    expected = torch.where(used, _exact(rows, latents, W, F32), torch.nan)
    assert torch.equal(dots.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("d", [20, 300])
def test_of_lists_of_varying_length_unused_places_are_0(d: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    lengths, n = [0, 3, 0, 70, 1], 60
    rows = integer_inputs(len(lengths), d, generator=generator, dtype=dtype)
    W = integer_inputs(n, d, generator=generator, dtype=dtype)
    starts, capacity = _starts(lengths), sum(lengths) + 9
    latents = torch.randint(n, (capacity,), generator=generator, dtype=torch.int32)
    latents[sum(lengths) :] = n
    with poison_empty():
        dots = launch_dots(*_on_device(rows, latents, W), starts=starts.to(DEVICE)).cpu()
    token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = (rows[token].float() * W[latents[: len(token)].long()].float()).sum(1)
    assert torch.equal(dots[: len(token)], expected)
    assert torch.equal(dots[len(token) :], torch.zeros(9))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_t1_as_accurate_as_pytorch(dtype: torch.dtype, generator: torch.Generator) -> None:
    rows, W = (torch.randn(size, 700, generator=generator).to(dtype) for size in (9, 50))
    latents = _lists(9, 21, 50, generator)
    ours = launch_dots(*_on_device(rows, latents, W)).cpu()
    assert_as_accurate(ours, _exact(rows, latents, W, F32), _exact(rows, latents, W), "dots")


def test_rows_may_lie_apart_and_columns_may_be_strided(generator: torch.Generator) -> None:
    wide, W = (integer_inputs(size, 300, generator=generator) for size in (5, 40))
    latents = _lists(5, 6, 40, generator)
    wide, W, latents = _on_device(wide, W, latents)
    expected = _exact(wide[:, 3:203], latents, W[:, 7:207], F32)
    assert torch.equal(launch_dots(wide[:, 3:203], latents, W[:, 7:207]), expected)
    by_column = wide[:, 3:203].T.contiguous().T
    assert torch.equal(launch_dots(by_column, latents.T.contiguous().T, W[:, 7:207]), expected)
    assert torch.equal(launch_dots(wide[:, 3:203]._neg_view(), latents, W[:, 7:207]), -expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_pair_has_the_same_bits_wherever_it_stands(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    B, k, n, d = 3, 20, 40, 300
    rows, W, latents = _on_device(
        torch.randn(B, d, generator=generator).to(dtype),
        torch.randn(n, d, generator=generator).to(dtype),
        _lists(B, k, n, generator),
    )
    dots = launch_dots(rows, latents, W)
    order = torch.randperm(k, generator=generator).to(DEVICE)
    assert torch.equal(launch_dots(rows, latents[:, order], W), dots[:, order])
    assert torch.equal(launch_dots(rows[2:3], latents[2:3, 17:18], W), dots[2:3, 17:18])
    roomy = torch.nn.functional.pad(latents, (0, 30))
    counts = torch.full((B,), k, dtype=torch.int32, device=DEVICE)
    assert torch.equal(launch_dots(rows, roomy, W, counts=counts)[:, :k], dots)
    starts = _starts([k] * B).to(DEVICE)
    assert torch.equal(launch_dots(rows, latents.flatten(), W, starts=starts).view(B, k), dots)
    for name, value in (("PARTS_BYTES", 1), ("PARTS_BYTES", 8 * B * k), ("NEAR", 1), ("ENOUGH_PROGRAMS", 1)):
        with monkeypatch.context() as context, poison_empty():
            context.setattr(launch, name, value)
            assert torch.equal(launch_dots(rows, latents, W), dots), (name, value)


def test_nan_and_infinity_stay_in_their_own_pairs() -> None:
    rows, W = torch.ones(3, 300), torch.ones(4, 300)
    rows[1, 299], W[2, 0] = torch.nan, torch.inf
    dots = launch_dots(*_on_device(rows, torch.arange(4).repeat(3, 1), W)).cpu()
    assert dots[0].tolist() == dots[2].tolist() == [300.0, 300.0, torch.inf, 300.0]
    assert bool(dots[1].isnan().all())


def _share_of_bound(rows: Tensor, latents: Tensor, W: Tensor, dots: Tensor) -> float:
    """Return the largest error as a share of what certified selections allow for."""
    d = rows.shape[1]
    worst = 0.0
    for token in range(len(rows)):
        x, w = rows[token].double(), W[latents[token].long()].double()
        bound = (d / 128 + 32) * 2.0**-23 * x.norm() * w.norm(dim=1)
        worst = max(worst, float(((dots[token].double() - w @ x).abs() / bound).max()))
    return worst


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("d", [5, 1500])
def test_the_error_keeps_to_the_bound_of_certified_selections(
    d: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows, W = (torch.rand(size, d, generator=generator).to(dtype) for size in (3, 20))  # of one sign: errors add up
    latents = _lists(3, 20, 20, generator)
    dots = launch_dots(*_on_device(rows, latents, W)).cpu()
    assert _share_of_bound(rows, latents, W, dots) < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_at_a_real_size(dtype: torch.dtype) -> None:
    B, capacity, n, d = 600, 256, 40_000, 4096
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.rand(B, d, device=DEVICE, generator=generator).to(dtype)
    W = torch.rand(n, d, device=DEVICE, generator=generator).to(dtype)
    latents = torch.randint(n, (B, capacity), device=DEVICE, generator=generator, dtype=torch.int32)
    counts = torch.randint(capacity + 20, (B,), device=DEVICE, generator=generator, dtype=torch.int32)
    counts[5], counts[-1] = 0, capacity
    with poison_empty():
        dots = launch_dots(rows, latents, W, counts=counts)
        again = launch_dots(rows, latents, W, counts=counts)
    used = torch.arange(capacity, device=DEVICE) < torch.where(counts > capacity, 0, counts)[:, None]
    assert torch.equal(dots.isfinite(), used)
    assert torch.equal(dots[used], again[used])
    full = launch_dots(rows, latents, W)
    assert torch.equal(dots[used], full[used])
    assert 0.0 < _share_of_bound(rows, latents, W, full) < 1.0

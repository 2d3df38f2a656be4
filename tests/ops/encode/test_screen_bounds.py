"""The kernels of the 8-bit screen round and bound as the theorem says: docs/numerics.md#the-int8-screen."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode import screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import launch_encode_topk
from flashsae.ops.encode.screen import MOST_COLUMNS, Rounded, padded, rounded, slack, typical_square
from flashsae.ops.select.above import above
from flashsae.ops.select.batch import batch_topk
from helpers.selection import HARD, batch_mistakes, float32_errors, hard_inputs, is_picked, selection_mistakes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# NumPy, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(divide by|invalid value|overflow|All-NaN slice) .*:RuntimeWarning")


def on_device(matrix: Tensor, seed: int, *, is_token: bool) -> Rounded:
    found = rounded(matrix.to(DEVICE), torch.tensor(seed, device=DEVICE), is_token=is_token)
    return Rounded(found.rows.cpu(), found.facts.cpu().double())


def screened(x: Tensor, W: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return products of rounded rows and how far they may be off, in float64."""
    tokens, latents = on_device(x, seed, is_token=True), on_device(W, seed, is_token=False)
    (unit, p, q), (_, S, A) = tokens.facts[:3, :, None], latents.facts
    return tokens.rows.double() @ latents.rows.double().T * unit * latents.facts[0] * screen.shift_of(
        tokens.rows.shape[1]
    ), (unit * (S * p + A * q)).nan_to_num(torch.inf)


def transformed(matrix: Tensor, seed: int, *, is_token: bool) -> tuple[Tensor, Rounded]:
    """Return what was rounded, in float64: found from the integers, as the kernel's matrix is known by what it does."""
    found = on_device(matrix, seed, is_token=is_token)
    unit = found.facts[0] * 128 if is_token else found.facts[1]
    H = rotation()
    columns = torch.nn.functional.pad(matrix.double(), (0, padded(matrix.shape[1]) - matrix.shape[1]))
    return (columns.unflatten(1, (-1, 128)) @ H).flatten(1) / unit[:, None], found


@functools.cache
def rotation() -> Tensor:
    """Return the matrix of the kernel: the integers of unit rows tell its signs."""
    signs = on_device(torch.eye(128), 0, is_token=True).rows.double().sign()
    assert bool((signs != 0).all())
    return signs


def test_the_rotation_is_orthogonal_and_no_plain_direction_owns_a_column() -> None:
    H = rotation()
    assert torch.equal(H @ H.T, 128 * torch.eye(128, dtype=torch.float64))
    assert float(H.sum(0).abs().max()) < 64  # of ones
    assert float((H * (1 - 2 * (torch.arange(128) % 2))[:, None]).sum(0).abs().max()) < 64


@pytest.mark.parametrize(("dtype", "is_token"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rows_are_rounded_up_or_down_and_the_mean_is_right(dtype: torch.dtype, is_token: bool) -> None:
    g = torch.Generator().manual_seed(1)
    row = torch.randn(1, 200, generator=g)
    row[0, 3] = 60.0
    matrix = row.to(dtype).expand(200, -1).contiguous()  # noise differs between rows
    numbers, found = transformed(matrix, 5, is_token=is_token)
    q = found.rows.double()
    assert float(q.abs().max()) == 127
    assert float((q - numbers).abs().max()) < 1.02
    fraction = numbers[0] - numbers[0].floor()
    deviation = (q - numbers).mean(0) * math.sqrt(200) / (fraction * (1 - fraction)).sqrt().clamp(min=0.05)
    assert float(deviation.abs().max()) < 5.5
    assert float(deviation.square().mean()) == pytest.approx(1, rel=0.35)
    other = on_device(matrix, 6, is_token=is_token).rows.double()
    assert 0.2 < float((q != other).double().mean()) < 0.5
    assert torch.equal(on_device(matrix, 5, is_token=is_token).rows, found.rows)


def test_noise_of_tokens_is_not_that_of_latents_nor_that_of_other_rows(generator: torch.Generator) -> None:
    rows = torch.randn(1, 1024, generator=generator).repeat(40, 1)
    numbers, tokens = transformed(rows, 9, is_token=True)
    _, latents = transformed(rows, 9, is_token=False)
    both = _standardised(torch.cat([tokens.rows.double(), latents.rows.double()]), numbers[0])
    z = (both @ both.T / math.sqrt(both.shape[1])).fill_diagonal_(0)
    assert float(z.abs().max()) < 5  # of 3160 pairs
    assert float(z.square().sum() / (80 * 79)) == pytest.approx(1, rel=0.2)


def _standardised(rounded: Tensor, numbers: Tensor) -> Tensor:
    """Return errors of rows that hold the same numbers, with variance 1, where that is not small."""
    fraction = numbers - numbers.floor()
    variance = fraction * (1 - fraction)
    return ((rounded - numbers) / variance.sqrt())[:, variance > 0.05]


def test_columns_of_a_row_are_rounded_independently() -> None:
    """A generator whose last steps mix too little shows here."""
    row = torch.zeros(1, 128)
    row[0, [1, 5, 77, 90]] = torch.tensor([1.0, 0.37, 0.19, 0.0831])
    numbers, found = transformed(row.repeat(6000, 1), 4, is_token=False)
    error = _standardised(found.rows.double(), numbers[0])
    assert error.shape[1] > 90
    z = (error.T @ error / math.sqrt(6000)).fill_diagonal_(0)
    assert float(z.abs().max()) < 5.5
    assert float(z.square().sum() / (len(z) * (len(z) - 1))) == pytest.approx(1, rel=0.1)


def widths() -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(2)
    for size in (1e-14, 1e-3, 1.0, 1e9):
        x = torch.randn(6, 300, generator=g) * size
        x[1:3, 7] *= 1000
        x[3] = 0
        x[3, 250] = size
        yield x


def test_facts_bound_the_norms_that_they_stand_for() -> None:
    for matrix in widths():
        numbers, found = transformed(matrix, 3, is_token=False)
        A = found.facts[2] / found.facts[1]
        assert bool((found.rows.double().square().sum(1) <= A).all())
        assert bool((numbers.norm(dim=1) <= A.sqrt()).all())
        assert bool(((numbers.norm(dim=1) + math.sqrt(384)) ** 2 * 1.01 >= A).all())  # nor is it much larger
        numbers, found = transformed(matrix, 3, is_token=True)
        square = 1.001 * numbers.square().sum(1)
        rate = torch.sqrt(8 * screen.LOG_CHANCE / (typical_square(384) + 1.002 / 1.001 * square))
        _, p, q = found.facts[:3]
        assert bool((q >= rate / 8).all())
        assert bool((p + q * typical_square(384) >= rate * (typical_square(384) + square) / 8 + 50 / rate).all())
        linear = rate * (typical_square(384) + square) / 8 + 50 / rate
        assert bool((p + q * typical_square(384) < 1.03 * linear).all())


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_of_hard_rows_leaves_its_bound(kind: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x, W, _ = (matrix.to(dtype) for matrix in hard_inputs(kind, 12, 150, 60, generator))
    estimate, error = screened(x, W, 8)
    assert bool(((x.double() @ W.double().T - estimate).abs() <= error + 2.4e-38).all())


def test_zeros_are_exact_and_what_is_not_finite_has_no_bound(generator: torch.Generator) -> None:
    x, W = torch.randn(2, 8, 130, generator=generator)
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = torch.nan, torch.inf, -torch.inf, 1e16
    W[1, 3], W[2, 4], W[3, 5] = torch.nan, torch.inf, 1e30
    estimate, error = screened(x, W, 1)
    assert bool((estimate[0, 4:] == 0).all())
    finite = torch.ones(8, 8, dtype=torch.bool)
    finite[1:5] = finite[:, 1:4] = False
    assert torch.equal(error.isfinite(), finite)
    assert bool((error[0, finite[0]] == 0).all())
    assert bool((error[5:, 4:] > 0).all())


def test_what_is_not_finite_is_selected_as_without_a_screen(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Of integers, so that every sum is exact; a token of zeros multiplies infinite weights, too."""
    x, W = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((5, 20), (200, 20)))
    b_enc = torch.randint(-40, 41, (200,), generator=generator).float()
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, -torch.inf
    W[77, 3], W[80, 5], W[81, 6], W[82] = torch.nan, torch.inf, -torch.inf, 0
    b_enc[[5, 95]], b_enc[9], b_enc[11] = torch.nan, torch.inf, -torch.inf
    x, W, keys = x.to(DEVICE), W.to(DEVICE), Keys(b_enc.to(DEVICE))
    finite = Keys(keys.b_enc.nan_to_num(1.0, 1.0, 1.0))  # nothing but weights tells
    threshold = torch.full((1,), 30.0, device=DEVICE)

    def selected(precision: str) -> list[tuple[Tensor, ...]]:
        return [
            launch_encode_topk(x, W, keys, 3, precision, [1 << 20, 0]),
            launch_encode_topk(x[:3], W, finite, 3, precision, [1 << 20, 0]),
            batch_topk(x[:3], W[:96], Keys(keys.b_enc[:96]), 3, precision, [1 << 20, 0]),
            above(x[:3], W[:96], keys.b_enc[:96], threshold, None, precision, [1 << 20, 0]),
        ]

    expected = selected("float32")
    monkeypatch.setattr(screen, "pays", lambda *_, **__: True)
    for precision in ("float32-int8", "bf16-int8"):
        torch.testing.assert_close(selected(precision), expected, rtol=0, atol=0, equal_nan=True)


def test_the_smallest_biases_of_a_token_of_zeros_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda *_, **__: True)
    b_enc = torch.zeros(300)
    b_enc[[120, 290]] = 1e-42  # bfloat16 has no such number
    _, picked = launch_encode_topk(
        torch.zeros(2, 40, device=DEVICE), torch.ones(300, 40, device=DEVICE), Keys(b_enc.to(DEVICE)), 3,
        "float32-int8", [1 << 20, 0],
    )  # fmt: skip
    assert picked.tolist() == [[0, 120, 290]] * 2


@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_bounds_of_the_kernels_fail_no_more_often_than_they_may(
    exponent: float, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(screen, "LOG_CHANCE", exponent)
    x, W = torch.randn(40, 100, generator=generator), torch.randn(150, 100, generator=generator)
    off = [(x.double() @ W.double().T - estimate) / error for estimate, error in (screened(x, W, s) for s in range(3))]
    share = torch.stack([(side * torch.stack(off) > 1).double().mean() for side in (1, -1)])
    assert float(share.max()) <= math.exp(-exponent)
    assert float(share.min()) > (0.02 if exponent == 0.5 else 0)  # there are some to be counted


def test_rows_too_wide_for_the_shared_memory_of_a_card_are_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled: tests/test_compile_kernels.py compares what kernels need with what cards have."""
    card, B, n = SimpleNamespace(shared_memory_per_block_optin=227 << 10), 1 << 20, 1 << 20
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert screen.pays(B, n, MOST_COLUMNS, 8, rounds=True, device=torch.device("cuda"))
    assert not screen.pays(B, n, MOST_COLUMNS + 1, 8, rounds=True, device=torch.device("cuda"))
    card.shared_memory_per_block_optin = 99 << 10
    assert screen.pays(B, n, MOST_COLUMNS // 2, 8, rounds=True, device=torch.device("cuda"))
    assert not screen.pays(B, n, MOST_COLUMNS // 2 + 1, 8, rounds=True, device=torch.device("cuda"))


def test_sums_of_the_widest_rows_fit_in_32_bits() -> None:
    assert 127**2 * MOST_COLUMNS < 2**31
    assert padded(MOST_COLUMNS) == MOST_COLUMNS
    assert (padded(1), padded(128), padded(129)) == (128, 128, 256)


@pytest.mark.parametrize("D", [128, 4096, MOST_COLUMNS])
def test_what_float32_changes_is_counted_with_room(D: int) -> None:
    adds = math.sqrt(128) * 16 * 2.0**-21  # of a row; beside that, two bfloat16 numbers stand for a float32 one
    needed = 2 * (adds + 2.0**-17) + (adds + 2.0**-17) ** 2 + (D / 128 + 32) * 2.0**-23
    # the estimate: three roundings, and two divisions that may be off by two units
    assert slack(D) > needed + 3 * 2.0**-24 + 2 * 2.0**-22


@pytest.fixture
def _screened_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda *_, **__: True)


@pytest.mark.usefixtures("_screened_at_any_size")
@pytest.mark.parametrize("kind", [*HARD, "alike"])
def test_t2_screened_float32_selects_as_float64_does(kind: str, generator: torch.Generator) -> None:
    x, W, bias = hard_inputs(kind, 5, 29, 200, generator)
    if kind == "alike":  # 8 bits cannot tell these apart, float32 can
        W, bias = W[:1] + 1e-3 * W, torch.zeros(200)
    inputs = x.to(DEVICE), W.to(DEVICE), Keys(bias.to(DEVICE))
    _, indices = launch_encode_topk(*inputs, 3, "float32-int8", [2 * 200 * 3, 0])
    assert selection_mistakes(x, W, bias, indices.cpu())[0] == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("_screened_at_any_size")
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("precision", ["float32-int8", "bf16-int8"])
def test_gpu_t2_every_selection_at_real_sizes(precision: str, kind: str, generator: torch.Generator) -> None:
    """Of bf16 operands what is exact is what float64 makes of these: rounding them is no error."""
    x, W, bias = (tensor.to(DEVICE) for tensor in hard_inputs(kind, 512, 768, 16384, generator))
    if precision == "bf16-int8":
        x, W = x.bfloat16().float(), W.bfloat16().float()
    noise = torch.tensor(11, device=DEVICE)
    acts, indices = launch_encode_topk(x, W, Keys(bias), 32, precision, [1 << 22, 0], noise=noise)
    assert selection_mistakes(x, W, bias, indices)[0] == 0
    pre_acts, error = float32_errors(x, W, bias)
    assert bool(((acts.double() - pre_acts.gather(1, indices)).abs() <= 2 * error.gather(1, indices)).all())
    again = launch_encode_topk(x, W, Keys(bias), 32, precision, [1 << 24, 0], noise=noise)
    assert torch.equal(again[1], indices)
    latents, starts, _ = batch_topk(x, W, Keys(bias), 32, precision, [1 << 22, 0], noise=noise)
    assert batch_mistakes(x, W, bias, is_picked(latents, starts, 16384)) == 0
    threshold = pre_acts.flatten().topk(512 * 32).values[-1:].float()
    latents, starts, _, _ = above(x, W, bias, threshold, None, precision, [1 << 22, 0], noise=noise)
    picked = is_picked(latents, starts, 16384)
    assert not bool((picked & (pre_acts + error < threshold)).any())
    assert not bool((~picked & (pre_acts - error > threshold)).any())

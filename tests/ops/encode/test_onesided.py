"""The selection from upper bounds, against all pre-activations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode import onesided
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout
from flashsae.ops.encode.onesided import select_onesided
from flashsae.testing import integer_inputs, poison_empty
from helpers.bounds import Bounds, brute_force, exact_pre_acts
from helpers.on_both import DEVICE
from helpers.selection import selection_mistakes

F32, BF16 = torch.float32, torch.bfloat16
NAN, INF = torch.nan, torch.inf


def select(x: Tensor, W: Tensor, keys: Keys, k: int, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, latents and counts."""
    layout = Layout.of(len(W), k)
    assert layout.group == 32
    acts = torch.full((len(x), k), NAN, device=DEVICE)
    indices = torch.full((len(x), k), -1, device=DEVICE)
    scale = None if keys.scale is None else keys.scale.to(DEVICE)
    on_device = Keys(keys.b_enc.to(DEVICE), scale, keys.magnitude)
    upper, maxima = bounds.upper.to(DEVICE), bounds.maxima.to(DEVICE, copy=True)
    with poison_empty():
        counts = select_onesided(x.to(DEVICE), W.to(DEVICE), on_device, layout, upper, maxima, (acts, indices))
    return acts.cpu(), indices.cpu(), counts.cpu()


def assert_exact(x: Tensor, W: Tensor, keys: Keys, k: int, bounds: Bounds) -> Tensor:
    """Assert that the selection is the only right one, where no sum rounds; return the counts."""
    acts, indices, counts = select(x, W, keys, k, bounds)
    pre_acts = exact_pre_acts(x, W, keys)
    values, expected = brute_force(pre_acts, keys.of(pre_acts), k)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(acts.double(), values, rtol=0, atol=0, equal_nan=True)
    assert bool((counts >= k).all())
    return counts


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let few extras fit."""
    monkeypatch.setattr(onesided, "most_extras", lambda k: 9)
    return 9


def integers(
    B: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    x, W = integer_inputs(B, d, generator=generator), integer_inputs(n, d, generator=generator)
    return x.to(dtype), W.to(dtype), integer_inputs(n, generator=generator)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("scaled", "magnitude"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("B", "d", "n", "k"), [(5, 6, 64, 1), (3, 13, 333, 5), (4, 40, 1601, 3), (2, 7, 1088, 17)])
def test_t0_ties_and_all_kinds_of_keys(
    B: int, d: int, n: int, k: int, scaled: bool, magnitude: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, W, bias = integers(B, d, n, generator, dtype)
    scale = torch.randint(0, 4, (n,), generator=generator).float() if scaled else None
    keys = Keys(bias, scale, magnitude)
    exact = keys.of(exact_pre_acts(x, W, keys))
    slack = torch.rand(exact.shape, generator=generator) * 4 * torch.randint(0, 2, exact.shape, generator=generator)
    assert_exact(x, W, keys, k, Bounds.of(exact, slack))


@pytest.mark.parametrize("slack", [0.0, 0.5, INF])
@pytest.mark.parametrize("k", [1, 6])
def test_t0_equal_rows_and_zeros(slack: float, k: int, generator: torch.Generator) -> None:
    x, W, bias = integers(3, 5, 390, generator)
    x[1] = 0.0
    W[:] = W[:1]
    W[7::2] = 0.0
    bias[:] = 0.0
    keys = Keys(bias)
    counts = assert_exact(x, W, keys, k, Bounds.of(keys.of(exact_pre_acts(x, W, keys)), slack))
    if slack == 0.0:
        assert counts[1] == k  # nothing of a row of zeros is rescored again


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("magnitude", [False, True])
def test_t0_what_is_not_finite(magnitude: bool, generator: torch.Generator) -> None:
    x, W, bias = integers(4, 5, 140, generator)
    x[1], x[2, 0], x[3, 1] = NAN, INF, -INF
    W[40], W[41, 2], bias[42], bias[43], bias[44:120] = NAN, INF, NAN, INF, -INF
    keys = Keys(bias, None, magnitude)
    exact = keys.of(exact_pre_acts(x, W, keys))
    for k in (1, 2):
        assert_exact(x, W, keys, k, Bounds.of(exact, 1.0))
        infinite = torch.rand(exact.shape, generator=generator) < 0.02
        assert_exact(x, W, keys, k, Bounds.of(torch.where(infinite, INF, exact), 0.0))


def test_t0_latents_of_minus_infinity_are_distinct_and_ascend(generator: torch.Generator) -> None:
    x, W, bias = integers(3, 5, 512, generator)
    bias[:] = -INF
    bias[[3, 100, 200]] = 0.0
    keys = Keys(bias)
    counts = assert_exact(x, W, keys, 8, Bounds.of(keys.of(exact_pre_acts(x, W, keys)), 0.0))
    assert counts.tolist() == [8] * 3


def test_t0_a_tie_with_a_lower_latent_outside_of_the_first(generator: torch.Generator) -> None:
    x, W, bias = torch.ones(1, 1), torch.ones(128, 1), torch.zeros(128)
    bias[100] = -0.5  # of the first, by its bound alone
    upper = torch.ones(1, 128, dtype=torch.double)
    upper[0, 0], upper[0, 100], upper[0, 90] = 1.0, 8.0, 7.0
    for k, expected in ((1, [0]), (2, [0, 1])):
        bounds = Bounds.of(upper, 0.0)
        _, indices, counts = select(x, W, Keys(bias), k, bounds)
        assert indices.tolist() == [expected]
    # only those before latent 90, whose key is τ and whose bound let it be first
    bias[100] = 0.5
    _, indices, counts = select(x, W, Keys(bias), 2, Bounds.of(upper, 0.0))
    assert indices.tolist() == [[0, 100]]
    assert counts.tolist() == [2 + 90]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [1, 3])
def test_t0_more_extras_than_fit(k: int, dtype: torch.dtype, few: int, generator: torch.Generator) -> None:
    x, W, bias = integers(5, 9, 205, generator, dtype)
    x[2], x[3] = 0.0, x[4]
    W[5::9] = W[5]
    keys = Keys(bias)
    exact = keys.of(exact_pre_acts(x, W, keys))
    slack = torch.rand(exact.shape, generator=generator)
    done = [assert_exact(x, W, keys, k, Bounds.of(exact, slack * size)) for size in (1, 400)]
    assert bool((done[0][3:] < k + few).all())
    assert bool((done[1][3:] == 205).all())  # done as a whole


def test_t0_what_does_not_fit_is_ruled_out(few: int, generator: torch.Generator) -> None:
    x, W = torch.ones(3, 1), torch.randperm(352, generator=generator).float()[:, None]
    keys = Keys(torch.zeros(352))
    exact = keys.of(exact_pre_acts(x, W, keys))
    slack = torch.rand(exact.shape, generator=generator)
    slack[exact < 3] = 999.0  # of the first five three are not the largest, so τ is small
    slack[1:][exact[1:] == 350] = 500.0
    slack[2][exact[2] < 30] = 500.0
    counts = assert_exact(x, W, keys, 5, Bounds.of(exact, slack))
    assert counts.tolist() == [5 + few, 5 + few, 352]


def test_t0_zeros_behind_latents_whose_bounds_mislead(few: int, generator: torch.Generator) -> None:
    """Most weights are zero: τ is below 0 at first, and all of them would be candidates."""
    x, W, bias = torch.ones(2, 4), torch.zeros(520, 4), torch.zeros(520)
    W[:10:2], W[1:10:2] = -1.0, 1.0
    keys = Keys(bias)
    exact = keys.of(exact_pre_acts(x, W, keys))
    slack = torch.where(exact == 0, 0.0, 9.0)
    counts = assert_exact(x, W, keys, 8, Bounds.of(exact, slack))
    assert counts.tolist() == [8 + few] * 2


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("magnitude", [False, True])
def test_t2_random_values(magnitude: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(7, 24, generator=generator).to(dtype)
    W = torch.randn(700, 24, generator=generator).to(dtype)
    keys = Keys(torch.randn(700, generator=generator), None, magnitude)
    exact = keys.of(exact_pre_acts(x, W, keys))
    acts, indices, _ = select(x, W, keys, 8, Bounds.of(exact, torch.rand(exact.shape, generator=generator) + 1e-5))
    assert selection_mistakes(x, W, keys.b_enc, indices, magnitude=magnitude)[0] == 0
    torch.testing.assert_close(acts, exact_pre_acts(x, W, keys).gather(1, indices).float())

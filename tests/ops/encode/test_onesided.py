"""The selection from what an 8-bit screen says, against all pre-activations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode import onesided, screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import launch_encode_topk
from flashsae.ops.encode.layout import Layout
from flashsae.ops.encode.onesided import OneSided
from flashsae.testing import integer_inputs, poison_empty
from helpers.on_both import DEVICE
from helpers.screens import Screen, as_keys, brute_force, exact_pre_acts, groups_of
from helpers.selection import selection_mistakes

F32, BF16 = torch.float32, torch.bfloat16
NAN, INF = torch.nan, torch.inf
FEW = 9


def select(x: Tensor, W: Tensor, keys: Keys, k: int, screen: Screen, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, latents and counts, of some tokens at a time."""
    layout, B = Layout.of(len(W), k), len(x)
    assert layout.group == 32
    acts = torch.full((B, k), NAN, device=DEVICE)
    indices = torch.full((B, k), -1, device=DEVICE)
    counts = torch.full((B,), -1, dtype=torch.int32, device=DEVICE)
    scale = None if keys.scale is None else keys.scale.to(DEVICE)
    on_device = Keys(keys.b_enc.to(DEVICE), scale, keys.magnitude)
    with poison_empty():
        selection = OneSided(x.to(DEVICE), W.to(DEVICE), on_device, layout, (acts, indices), counts)
        for start in range(0, B, rows):
            selection.add(screen.part(start, min(B, start + rows), DEVICE))
        selection.finish()
    return acts.cpu(), indices.cpu(), counts.cpu()


def assert_exact(x: Tensor, W: Tensor, keys: Keys, k: int, screen: Screen) -> list[int]:
    """Assert that the selection is the only right one, where no sum rounds; return the counts."""
    acts, indices, counts = select(x, W, keys, k, screen)
    pre_acts = exact_pre_acts(x, W, keys)
    values, expected = brute_force(pre_acts, keys.of(pre_acts), k)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(acts.double(), values, rtol=0, atol=0, equal_nan=True)
    return counts.tolist()


def screen_of(x: Tensor, W: Tensor, keys: Keys, width: Tensor | float, generator: torch.Generator) -> Screen:
    """Return a screen whose errors are up to `width` for tokens of even number, three times that for others."""
    return Screen.of(x, keys.of(exact_pre_acts(x, W, keys)), torch.ones(len(W)) * width, generator)


@pytest.fixture(autouse=True)
def _errors_as_wide_as_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let guesses allow for all of an error: those made here fill their bounds, while a screen's are a twelfth."""
    monkeypatch.setattr(onesided, "SHARE", 1.0)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few extras fit."""
    monkeypatch.setattr(Layout, "capacity", property(lambda self: self.k + FEW))


def integers(B: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
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
    width = torch.rand(n, generator=generator) * 4 * torch.randint(0, 2, (n,), generator=generator)
    assert_exact(x, W, keys, k, screen_of(x, W, keys, width, generator))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("width", [0.0, 0.5, INF])
@pytest.mark.parametrize("k", [1, 6])
def test_t0_equal_rows_and_zeros(width: float, k: int, generator: torch.Generator) -> None:
    x, W, bias = integers(3, 5, 390, generator)
    x[1] = 0.0
    W[:] = W[:1]
    W[7::2] = 0.0
    bias[:] = 0.1  # no number of bfloat16
    keys = Keys(bias)
    counts = assert_exact(x.where(x == 0, 1.0), W, keys, k, screen_of(x, W, keys, width, generator))
    assert width == INF or counts[1] == k  # nothing else of a token of zeros is rescored


def test_t0_biases_of_a_token_of_zeros(generator: torch.Generator) -> None:
    x, W, bias = torch.zeros(2, 5), torch.ones(256, 5), 1 + torch.randint(0, 5, (256,), generator=generator) * 2.0**-20
    keys = Keys(bias, 1 + torch.randint(0, 2, (256,), generator=generator) * 2.0**-20)
    _, indices, _ = select(x, W, keys, 4, screen_of(x, W, keys, 1.0, generator))
    expected = brute_force(bias[None], (keys.b_enc * keys.scale)[None], 4)[1]
    assert torch.equal(indices, expected.expand(2, -1))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("magnitude", [False, True])
def test_t0_what_is_not_finite(magnitude: bool, generator: torch.Generator) -> None:
    x, W, bias = integers(4, 5, 140, generator)
    x[1], x[2, 0], x[3, 1] = NAN, INF, -INF
    W[40], W[41, 2], bias[42], bias[43], bias[44:120] = NAN, INF, NAN, INF, -INF
    keys = Keys(bias, None, magnitude)
    for k in (1, 2):
        screen = screen_of(x, W, keys, 1.0, generator)
        counts = assert_exact(x, W, keys, k, screen)
        assert magnitude or counts[0] < 140  # a few latents without bounds are no reason to do all
        assert counts[1] == k  # the first NaN are the answer
        screen.screened.of_tokens[1:, 1:] = NAN  # tokens and latents that cannot be rounded
        screen.screened.of_latents[:, 40:42], screen.screened.of_groups[:, 1] = NAN, NAN
        screen.centres[1:, :40], screen.centres[:, 40:42] = 0.0, 9.0
        screen.screened.maxima.copy_(as_keys(groups_of(screen.centres.float(), 140)))
        counts = assert_exact(x, W, keys, k, screen)
        assert magnitude or counts[0] < 140


def test_t0_latents_of_minus_infinity_are_distinct_and_ascend(generator: torch.Generator) -> None:
    x, W, bias = integers(3, 5, 512, generator)
    bias[:] = -INF
    bias[[3, 100, 200]] = 0.0
    keys = Keys(bias)
    assert assert_exact(x, W, keys, 8, screen_of(x, W, keys, 0.5, generator)) == [8] * 3


@pytest.mark.parametrize(
    ("key", "expected", "count"), [(-0.5, [0, 100], 125), (0.5, [90, 100], 2), (0.0, [0, 100], 92)]
)
def test_t0_of_equal_keys_outside_of_the_first_the_lowest_wins(
    key: float, expected: list[int], count: int, generator: torch.Generator
) -> None:
    """Latents 90 and 100 are the first; the key of most others is 0 for certain."""
    x, W, bias, width = torch.ones(1, 1), torch.ones(128, 1), -torch.ones(128), torch.zeros(128)
    bias[90], bias[100], bias[95:98], width[90:101:10] = key - 1.0, 0.0, -8.0, 2.0
    keys = Keys(bias)
    screen = screen_of(x, W, keys, width, generator)
    screen.centres[0, 90:101:10], screen.screened.maxima[0, 2:] = 2.0, 0x40000000
    assert assert_exact(x, W, keys, 2, screen) == [count]
    assert select(x, W, keys, 2, screen)[1].tolist() == [expected]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.usefixtures("few")
def test_t0_more_extras_than_fit(k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x, W, bias = integers(5, 9, 205, generator, dtype)
    x[2], x[3] = 0.0, x[4]
    W[5::9] = W[5]
    keys = Keys(bias)
    done = [assert_exact(x, W, keys, k, screen_of(x, W, keys, width, generator)) for width in (0.5, 400)]
    assert max(done[0][3:]) < k + FEW
    assert done[1][3:] == [205, 205]  # done as a whole


@pytest.mark.usefixtures("few")
def test_t0_what_does_not_fit_is_ruled_out(generator: torch.Generator) -> None:
    x, W = torch.ones(3, 1), torch.randperm(352, generator=generator).float()[:, None]
    keys = Keys(torch.zeros(352))
    screen = screen_of(x, W, keys, torch.where(W[:, 0] < 3, 999.0, 0.0), generator)
    exact = exact_pre_acts(x, W, keys)
    lifted = (exact < 3) & (torch.arange(3)[:, None] < 2)  # of the first five three are not the largest: τ is small
    screen.centres[lifted] = 990.0
    screen.screened.maxima[lifted.unflatten(1, (-1, 32)).any(2)] = torch.tensor(990.0).view(torch.int32)
    counts = assert_exact(x, W, keys, 5, screen)
    assert counts[:2] == [5 + FEW] * 2


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("magnitude", [False, True])
def test_t0_a_guess_that_fails_costs_time_and_no_latent(
    share: float, magnitude: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onesided, "SHARE", share)
    x, W, bias = integers(12, 6, 400, generator)
    x[3] = 0.0
    keys = Keys(bias, None, magnitude)
    counts = assert_exact(x, W, keys, 5, screen_of(x, W, keys, 30.0, generator))
    assert 400 in counts  # done as a whole
    assert min(counts) < 400


def test_t0_a_centre_that_is_rounded_further_than_it_is_off(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onesided, "SHARE", 0.5)
    x, W, bias = torch.ones(1, 1), torch.ones(200, 1), torch.zeros(200)
    bias[7] = 1027.5  # 1028.5 is 1032 in bfloat16
    keys = Keys(bias)
    assert assert_exact(x, W, keys, 1, screen_of(x, W, keys, 0.01, generator)) == [1]


@pytest.mark.parametrize("first", [0, 510])
@pytest.mark.usefixtures("few")
def test_t0_zeros_beside_latents_whose_bounds_mislead(first: int, generator: torch.Generator) -> None:
    """Most weights are zero: τ is below 0 at first, and all of them would be candidates."""
    x, W, bias = torch.ones(2, 4), torch.zeros(520, 4), torch.zeros(520)
    W[first : first + 10 : 2], W[first + 1 : first + 10 : 2] = -1.0, 1.0
    keys = Keys(bias)
    counts = assert_exact(x, W, keys, 8, screen_of(x, W, keys, torch.where(W[:, 0] == 0, 0.0, 9.0), generator))
    assert counts == [8 + FEW] * 2


@pytest.mark.usefixtures("few")
def test_t0_a_lower_latent_that_ties_does_not_fit(generator: torch.Generator) -> None:
    """The first is 100, extras that just fit reach above 0, and of zeros before it none fits."""
    x, W, bias, width = torch.ones(1, 1), torch.zeros(128, 1), torch.zeros(128), torch.zeros(128)
    W[110:119], width[110:119], width[100] = -1.0, 2.0, 3.0
    keys = Keys(bias)
    screen = screen_of(x, W, keys, width, generator)
    screen.centres[0, 110:119], screen.centres[0, 100], screen.screened.maxima[0, 3] = 0.5, 2.0, 0x40000000
    assert assert_exact(x, W, keys, 1, screen) == [128]


def test_t0_a_guess_that_is_too_high_is_found_out(generator: torch.Generator) -> None:
    """Lower bounds that do not hold, which a screen has by chance, cost a row done as a whole and nothing else."""
    x, W, bias = integers(2, 5, 300, generator)
    keys = Keys(bias)
    screen = screen_of(x, W, keys, 0.0, generator)
    far = torch.tensor(1000.0)
    screen.centres[0, 3:7], screen.screened.maxima[0, 0] = far, far.view(torch.int32)
    counts = assert_exact(x, W, keys, 3, screen)
    assert counts[0] == 300
    assert counts[1] < 300


@pytest.mark.parametrize(("magnitude", "dtype", "rows"), [(False, F32, 2), (True, BF16, 3), (False, BF16, 7)])
def test_t2_random_values_in_rounds(
    magnitude: bool, dtype: torch.dtype, rows: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onesided, "ROUND", 5)
    x = torch.randn(7, 24, generator=generator).to(dtype)
    W = torch.randn(700, 24, generator=generator).to(dtype)
    keys = Keys(torch.randn(700, generator=generator), None, magnitude)
    acts, indices, counts = select(x, W, keys, 8, screen_of(x, W, keys, 0.5, generator), rows)
    assert selection_mistakes(x, W, keys.b_enc, indices, magnitude=magnitude)[0] == 0
    torch.testing.assert_close(acts, exact_pre_acts(x, W, keys).gather(1, indices).float())
    assert int(counts.min()) >= 8
    assert int(counts.max()) < 100


@pytest.mark.filterwarnings("ignore:(All-NaN slice|overflow|invalid value) encountered")  # NumPy, in the interpreter
@pytest.mark.parametrize(
    ("scaled", "magnitude", "precision"), [(0, 0, "bf16-int8"), (1, 0, "float32-int8"), (1, 1, "bf16-int8")]
)
@pytest.mark.parametrize(("B", "d", "n", "k"), [(5, 3, 64, 1), (3, 130, 333, 5), (9, 40, 1089, 17)])
def test_t0_behind_a_screen(
    B: int, d: int, n: int, k: int, scaled: int, magnitude: int, precision: str, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(screen, "pays", lambda *_, **__: True)
    x, W, bias = integers(B, d, n, generator)
    x[0], W[n // 3], W[n // 2], x[-1, 0] = 0.0, 0.0, W[n // 3 - 1], 200.0
    W[-1, 0], W[-2, -1], bias[1] = NAN, INF, -INF
    scale = torch.randint(0, 4, (n,), generator=generator).float() if scaled else None
    keys = Keys(bias, scale, bool(magnitude))
    counts = torch.full((B,), -1, dtype=torch.int32, device=DEVICE)
    on_device = Keys(bias.to(DEVICE), None if scale is None else scale.to(DEVICE), bool(magnitude))
    with poison_empty():
        code = launch_encode_topk(x.to(DEVICE), W.to(DEVICE), on_device, k, precision, [n * 8, 0], counts)
    pre_acts = exact_pre_acts(x, W, keys)
    values, expected = brute_force(pre_acts, keys.of(pre_acts), k)
    assert torch.equal(code[1].cpu(), expected)
    torch.testing.assert_close(code[0].cpu().double(), values, rtol=0, atol=0, equal_nan=True)
    assert int(counts.min()) >= k

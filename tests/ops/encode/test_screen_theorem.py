"""Every step of the proof in docs/numerics.md#the-int8-screen, in float64 and by enumeration where there is little."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode.screen import LOG_CHANCE, typical_square
from helpers.pages import ROOT

DELTA = 2.0**-16
"""What noise of 16 bits, added in float32, may change of a mean."""


def outcomes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return all results of rounding numbers up or down at random, [2^D, D], and how likely each is, [2^D]."""
    up = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(numbers))), dtype=torch.float64)
    fraction = numbers - numbers.floor()
    return numbers.floor() + up, torch.where(up > 0, fraction, 1 - fraction).prod(1)


def errors(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return qx·qw - u·v, how likely it is, and A, for all outcomes, [2^D, 2^D]; and B."""
    (qx, of_x), (qw, of_w) = outcomes(u), outcomes(v)
    return qx @ qw.T - u @ v, of_x[:, None] * of_w, qw.square().sum(1), float(u @ u)


def rows(kind: str, width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(width)
    u, v = 254 * torch.rand(2, width, generator=g, dtype=torch.float64) - 127
    if kind == "halves":
        u, v = u.floor() + 0.5, v.floor() + 0.5
    elif kind == "small":
        u, v = u / 127, v / 127
    elif kind == "lopsided":  # far from a symmetric error
        u, v = u.floor() + 0.003, v.floor() + 0.997
    elif kind == "one outlier":
        u[1:], v[1:] = u[1:] / 500, v[1:] / 500
    elif kind == "integers":
        u = u.floor()
    elif kind == "opposite":
        v = -u
    return u, v


KINDS = ["uniform", "halves", "small", "lopsided", "one outlier", "integers", "opposite"]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_and_the_tails_are_bounded(kind: str, width: int) -> None:
    """All 2^16 outcomes of the noise of two rows of 8: nothing is estimated."""
    err, chance, A, B = errors(*rows(kind, width))
    assert float(chance.sum()) == pytest.approx(1, abs=1e-12)
    assert float((chance * err).sum()) == pytest.approx(0, abs=1e-9)
    for scale in (0.01, 0.1, 0.5, 1.0, 2.0, 4.0):
        rate = scale / math.sqrt(typical_square(width) + B)
        for sign in (-1, 1):
            moment = float((chance * torch.exp(sign * rate * err - rate**2 * (A + B) / 8)).sum())
            assert moment <= 1 + 1e-12
    for exponent in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        rate = math.sqrt(8 * exponent / (typical_square(width) + B))
        slack = rate * (A + B) / 8 + exponent / rate
        for sign in (-1, 1):
            assert float(chance[sign * err > slack].sum()) <= math.exp(-exponent)


def test_the_constant_of_the_lemma_is_the_best() -> None:
    err, chance, A, B = errors(*rows("halves", 8))
    rate = 0.1 / math.sqrt(B)
    assert float((chance * torch.exp(rate * err - rate**2 * (A + B) / 8)).sum()) <= 1
    assert float((chance * torch.exp(rate * err - rate**2 * (A + B) / 8.1)).sum()) > 1


def test_the_lemma_is_false_for_a_rate_that_follows_the_noise() -> None:
    err, chance, A, B = errors(*torch.tensor([[1.0], [0.5]], dtype=torch.float64))

    def moment(rate: Tensor) -> float:
        return float((chance * torch.exp(-rate * err - rate.square() * (A + B) / 8)).sum())

    assert moment(torch.sqrt(8 * 0.05 / (A + B))) > 1.03
    assert moment(torch.sqrt(8 * 0.05 / torch.full_like(A, 0.5 + B))) < 1


def test_the_linear_bound_lies_above_the_best_and_touches_it() -> None:
    typical = typical_square(4096)
    spread = torch.logspace(-3, 1.2, 60, dtype=torch.float64)
    A, B = typical * spread, typical * spread[:, None]
    rate = torch.sqrt(8 * LOG_CHANCE / (typical + B))
    linear = rate * (A + B) / 8 + LOG_CHANCE / rate
    best = torch.sqrt(LOG_CHANCE * (A + B) / 2)
    assert bool((linear >= best * (1 - 1e-12)).all())
    at = torch.sqrt(LOG_CHANCE * (typical + B) / 2)
    torch.testing.assert_close(rate * (typical + B) / 8 + LOG_CHANCE / rate, at)
    usual = torch.log2(torch.stack(torch.broadcast_tensors(A, B)) / typical).abs().amax(0) < 1
    assert float((linear / best)[usual].max()) < 1.05


def hard_to_round() -> Tensor:
    """Numbers in float32, scaled as rows are, where 16 bits of noise or a sum in float32 could mislead."""
    g = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, 1.0, -1.0, 126.99999, -126.99999, 1e-38, -1e-38, 1 - 2.0**-24, 2.0**-24 - 1])
    near = 1 - 2.0**-16 * torch.arange(8) - 2.0**-24 * torch.arange(9)[:, None]
    ties = 2.0**-17 * (1 + 2 * torch.arange(8)) + torch.tensor([[0.0], [-(2.0**-25)], [2.0**-25], [7.0], [-90.0]])
    small = torch.logspace(-20, 0, 20, base=2.0) * 0.999
    everywhere = 254 * torch.rand(40, generator=g) - 127
    return torch.cat([odd, near.flatten(), ties.flatten(), small, -small, everywhere, everywhere / 127]).float()


def nearest(numbers: Tensor, bits: Tensor, half: float = 0.5) -> Tensor:
    """Return what the kernel makes of numbers and 16 bits of noise, in its float32 arithmetic."""
    magic = 1.5 * 2.0**23
    moved = numbers + (1 + bits.float() / 2**16)
    return ((moved - (1.5 - half / 2**16)) + magic) - magic


def test_sixteen_bits_of_noise_move_the_mean_by_a_unit_at_most() -> None:
    bits, biased = torch.arange(2**16), 0.0
    for numbers in hard_to_round().split(64):
        rounded = nearest(numbers[:, None], bits)
        assert float((rounded.amax(1) - rounded.amin(1)).max()) == 1  # each number becomes one of two
        assert float((rounded.double().mean(1) - numbers.double()).abs().max()) < DELTA
        mean = nearest(numbers[:, None], bits, 0.0).double().mean(1)
        biased = max(biased, float((mean - numbers.double()).abs().max()))
    assert biased > DELTA  # the half is needed
    integers = torch.arange(-126.0, 127.0)
    assert torch.equal(nearest(integers[:, None], bits[::257]), integers[:, None].expand(-1, 256))


def hadamard(width: int = 128) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def rotated(matrix: Tensor, signs: Tensor) -> Tensor:
    return ((matrix * signs).unflatten(1, (-1, 128)) @ hadamard()).flatten(1)


def test_the_transform_keeps_products_and_spreads_outliers(generator: torch.Generator) -> None:
    torch.testing.assert_close(hadamard() @ hadamard().T, torch.eye(128, dtype=torch.float64))
    x, W = torch.randn(2, 16, 256, generator=generator, dtype=torch.float64)
    x[:, 7] = 1000
    signs = torch.randint(0, 2, (256,), generator=generator) * 2.0 - 1
    a, b = rotated(x, signs), rotated(W, signs)
    torch.testing.assert_close(a @ b.T, x @ W.T)
    share = a.abs().amax(1) / a.norm(dim=1)
    assert float(share.max()) < 0.1  # it was 1
    assert float((x.abs().amax(1) / x.norm(dim=1)).min()) > 0.9


def rounded(matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers, scales and scaled rows, as the screen makes them."""
    scale = matrix.abs().amax(1, keepdim=True) * (1 + 2.0**-20) / 127
    numbers = matrix / scale
    noise = (torch.randint(0, 2**16, matrix.shape, generator=generator) + 0.5) / 2**16
    return torch.floor(numbers + noise), scale, numbers


def test_bounds_fail_no_more_often_than_they_may(generator: torch.Generator) -> None:
    """At a small exponent, where failures can be counted; the theorem is the same."""
    x, W = torch.randn(300, 256, generator=generator).double(), torch.randn(400, 256, generator=generator).double()
    qx, t, u = rounded(rotated(x, torch.ones(256)), generator)
    qw, s, _ = rounded(rotated(W, torch.ones(256)), generator)
    assert float(qx.abs().max()) <= 127
    error = (x @ W.T) / (t * s.T) - qx @ qw.T
    A, B = qw.square().sum(1), 1.002 * u.square().sum(1, keepdim=True)
    shares = []
    for exponent in (0.25, 1.0, 2.0, 3.0, 50.0):
        rate = torch.sqrt(8 * exponent / (typical_square(256) + B))
        slack = rate * (A + B) / 8 + exponent / rate
        for side in (error, -error):
            shares.append(float((side > slack).double().mean()))
            assert shares[-1] <= math.exp(-exponent)
    assert shares[0] > 0.15  # there are failures to be counted
    assert shares[-1] == 0
    deviation = float((error / (A + B).sqrt()).std())
    assert deviation == pytest.approx(1 / math.sqrt(6), rel=0.03)  # twelve of them are in the bound


def test_the_chance_of_a_run_is_below_what_is_stated() -> None:
    steps, tokens, k = 10**6, 8192, 64
    one_sided, batch, above = k + 512, 524288 + k, 524288
    for pairs in (one_sided, batch, above):
        assert steps * tokens * pairs * math.exp(-LOG_CHANCE) < 1e-6
    assert steps * tokens * k * math.exp(-LOG_CHANCE) < 1.1e-10
    assert steps * tokens * above * math.exp(-(LOG_CHANCE - 1)) > 1e-6  # so it is not larger than it must be


INFINITE, NAN = 3, 4
"""Keys of what is not finite: bounds go up to the first, and NaN ranks above it."""


def test_the_page_says_what_the_code_has() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text("utf-8")
    assert f"`LOG_CHANCE` = {LOG_CHANCE:.0f}" in page
    assert "`typical_square(D)` = D · 127² / 14" in " ".join(page.split())
    assert typical_square(128) == 127**2 * 128 / 14


def exact_selection(keys: tuple[int, ...], k: int) -> set[int]:
    return set(sorted(range(len(keys)), key=lambda latent: (-keys[latent], latent))[:k])


def one_sided(keys: tuple[int, ...], upper: tuple[int, ...], k: int, *, leave_out: str = "") -> set[int]:
    """Select as docs/numerics.md#from-pairs-to-selections says."""
    first = exact_selection(upper, k)
    tau = min(keys[latent] for latent in first)
    last = max(latent for latent in first if keys[latent] == tau)
    chosen = set(first)
    for latent, bound in enumerate(upper):
        tied = bound == tau and latent < last and leave_out != "ties"
        maybe_nan = bound == tau == INFINITE and leave_out != "nan"
        if bound > tau or tied or maybe_nan:
            chosen.add(latent)
    listed = sorted(chosen)
    return {listed[place] for place in exact_selection(tuple(keys[latent] for latent in listed), k)}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("keys", "rule"), [((0, 1, 2), "ties"), ((1, INFINITE, NAN), "nan")])
def test_upper_bounds_of_the_picks_are_all_that_a_selection_needs(keys: tuple[int, ...], rule: str, k: int) -> None:
    """Every row of 4 keys of few values, so that ties are everywhere, with every choice of bounds."""
    matters = False
    for row in itertools.product(keys, repeat=4):
        picks = exact_selection(row, k)
        for upper in itertools.product((0, 1, 2, INFINITE), repeat=4):
            if all(upper[latent] >= min(row[latent], INFINITE) for latent in picks):  # those of others may be wrong
                assert one_sided(row, upper, k) == picks
                matters |= one_sided(row, upper, k, leave_out=rule) != picks
    assert matters  # or the rule would not be needed


def test_a_pick_below_its_key_can_be_lost() -> None:
    assert one_sided((1, 2, 0), (2, 0, 2), 1) != exact_selection((1, 2, 0), 1)

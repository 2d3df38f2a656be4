"""The 8-bit screen: rounded rows, products and bounds that hold, and selections through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode import screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import launch_encode_topk
from flashsae.ops.select import launch as select
from flashsae.ops.select.reference import above as reference_above
from flashsae.ops.select.reference import batch_topk as reference_batch_topk

MEMORY = [1 << 20, 0]
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda *_, **__: True)


def case(d: int, n: int, B: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens with outlier columns, a token of zeros and a huge one, weights with rows of zeros, and biases."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=g) / d**0.5 * (0.5 + torch.rand(n, 1, generator=g))
    x = torch.randn(B, d, generator=g) * torch.where(torch.rand(d, generator=g) < 0.03, 100.0, 1.0)
    x[B // 2], x[B // 3] = 0, x[B // 3] * 1e4
    W[n // 2] = 0
    return x.to(dtype), W.to(dtype), torch.randn(n, generator=g) * 0.1


def both(x: Tensor, W: Tensor, seed: int = 5) -> tuple[screen.Rounded, screen.Rounded]:
    noise = torch.tensor(seed)
    return screen.rounded(x, noise, is_token=True), screen.rounded(W, noise, is_token=False)


def error_of(x: screen.Rounded, W: screen.Rounded) -> Tensor:
    """Return by how much products may be off: [B, n], float64."""
    unit, p, q = x.facts[:3].double().unsqueeze(2).unbind(0)
    return unit * (W.facts[1].double() * p + W.facts[2].double() * q)


def product_of(x: screen.Rounded, W: screen.Rounded) -> Tensor:
    tokens, latents = x.facts[0].double()[:, None] * x.rows, W.facts[1].double()[:, None] * W.rows
    return tokens @ latents.T


SHAPES = [(384, 96, 20, torch.float32), (100, 70, 9, torch.bfloat16), (129, 33, 4, torch.float32)]


@pytest.mark.parametrize(("d", "n", "B", "dtype"), SHAPES)
def test_a_product_of_rounded_rows_is_within_its_bound(d: int, n: int, B: int, dtype: torch.dtype) -> None:
    x, W, _ = case(d, n, B, dtype)
    left, right = both(x, W)
    off = (product_of(left, right) - x.double() @ W.double().T).abs()
    bound = error_of(left, right)
    assert bool((off <= bound).all())
    used = bound > 0
    assert not bool(used[B // 2].any()), "a token of zeros has no error"
    assert 0.05 < float((off / bound)[used].max()) < 0.7  # neither trivial nor near: bounds are 12 deviations wide


def test_rounding_is_right_on_average_and_of_8_bits() -> None:
    x, W, _ = case(256, 40, 4, torch.float32)
    exact = x.double() @ W.double().T
    bound = error_of(*both(x, W))
    off = torch.stack([product_of(*both(x, W, seed)) - exact for seed in range(40)])
    used = (bound > 0) & (torch.arange(40) != 20)  # the row of zeros
    deviation = (off.square().mean(0).sqrt() / bound)[used]
    assert float(deviation.min()) > 0.04
    assert float(deviation.max()) < 0.2
    assert float((off.mean(0).abs() / off.std(0))[used].max()) < 5 / 40**0.5
    left, right = both(x, W)
    for rows in (left.rows[[0, 1, 3]], right.rows[:20]):
        assert rows.abs().amax(1).min() >= 126
        assert not bool((rows == -128).any())


def test_noise_depends_on_seed_row_and_matrix_and_on_nothing_else() -> None:
    x, W, _ = case(256, 64, 8, torch.float32)
    same = screen.rounded(x, torch.tensor(5), is_token=True)
    assert torch.equal(both(x, W)[0].rows, same.rows)
    assert torch.equal(screen.rounded(x[4:], torch.tensor(5), is_token=True, first=4).rows, same.rows[4:])
    assert not torch.equal(screen.rounded(x[4:], torch.tensor(5), is_token=True).rows, same.rows[4:])
    for other in (torch.tensor(6), torch.tensor(5 + 2**32), None):
        assert not torch.equal(screen.rounded(x, other, is_token=True).rows, same.rows)
    assert torch.equal(
        screen.rounded(x, None, is_token=True).rows, screen.rounded(x, torch.tensor(0), is_token=True).rows
    )
    assert not torch.equal(screen.rounded(x, torch.tensor(5), is_token=False).rows, same.rows)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "n", "B", "dtype"), SHAPES)
def test_centres_and_what_bounds_them(
    d: int, n: int, B: int, dtype: torch.dtype, scaled: bool, magnitude: bool
) -> None:
    x, W, b = case(d, n, B, dtype)
    x[0, 1], W[1, 0], b[2], b[3] = torch.nan, torch.inf, torch.nan, -torch.inf
    left, right = both(x, W)
    keys = Keys(b, torch.rand(n) if scaled else None, magnitude)
    out = torch.empty(B, -(-n // 8) * 8, dtype=torch.bfloat16)
    maxima = torch.empty(B, -(-n // 32), dtype=torch.int32)
    screen.centres(left, right, keys, out, maxima)
    of_latents, of_groups = screen.errors_of(right.facts, keys.scale)
    centre = out[:, :n].double()
    exact = keys.of(x.double() @ W.double().T + b.double())
    unit, p, q = left.facts[:3].double().unsqueeze(2).unbind(0)
    error = unit * (of_latents[0].double() * p + of_latents[1].double() * q)
    error += torch.where(centre.isfinite(), centre.abs() * 2**-8 * (1 + 2**-6), 0.0)
    known = exact.isfinite() & error.isfinite()
    assert bool((known.sum(1)[1:] >= n - 3).all())
    assert not bool(known[0].any())
    assert bool(((centre - exact).abs() <= error)[known].all())
    assert bool(error.isnan()[0].all())
    assert bool(error.isnan()[:, 1].all())
    assert not bool(centre.isnan().any())
    assert bool((centre[1:, 2] == torch.inf).all())
    if not magnitude and not scaled:
        assert bool((centre[1:, 3] == -torch.inf).all())
    padded = torch.nn.functional.pad(out[:, :n].float(), (0, -n % 32), value=-torch.inf).view(B, -1, 32)
    largest = padded.amax(2)
    bits = torch.where(largest == 0, torch.zeros_like(largest), largest).view(torch.int32)
    assert torch.equal(maxima, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    both_facts = torch.nn.functional.pad(of_latents, (0, -n % 32)).view(2, -1, 32)
    assert torch.equal(of_groups.nan_to_num(-1), both_facts.amax(2).nan_to_num(-1))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-10, 1e14, 1e20, 1e36])
def test_sizes_that_8_bits_cannot_take(scale: float) -> None:
    """Tiny rows have a bound of their norm, too large ones none; neither is passed over."""
    x, W, _ = case(128, 40, 8, torch.float32)
    for left, right in ((x * scale, W), (x, W * scale)):
        rounded = both(left, right)
        off = (product_of(*rounded) - left.double() @ right.double().T).abs()
        bound = error_of(*rounded)
        assert bool(((off <= bound + 1e-44) | bound.isnan()).all())
        assert bool(bound.isnan().any()) == (scale > 1e13)


def test_a_scale_that_makes_an_error_vanish_bounds_it_all_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(8, 128, generator=g) * 1e14, torch.randn(40, 128, generator=g) * 1e-15, torch.zeros(40)
    scale = torch.full((40,), 1e-32)
    scale[5] = 0
    left, right = both(x, W)
    out, maxima = torch.empty(8, 40, dtype=torch.bfloat16), torch.empty(8, 2, dtype=torch.int32)
    screen.centres(left, right, Keys(b, scale), out, maxima)
    of_latents, of_groups = screen.errors_of(right.facts, scale)
    unit, p, q = left.facts[:3].double().unsqueeze(2).unbind(0)
    error = unit * (of_latents[0].double() * p + of_latents[1].double() * q) + out.double().abs() * 2**-8
    off = (out.double() - (x.double() @ W.double().T) * scale.double()).abs()
    assert float(off.max()) > 1e-35, "no number that is too small"
    assert bool((off <= error).all())
    assert not bool(error[:, 5].any()), "what weighs nothing is known"
    assert bool((of_groups[:, 0] >= of_latents.amax(1)).all())


@pytest.mark.parametrize("magnitude", [False, True])
def test_certified_keys_that_vanish_in_the_unit_of_a_token_are_selected_all_the_same(magnitude: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 32, generator=g) * 1e14, torch.randn(520, 32, generator=g) * 1e-15
    keys = Keys(torch.zeros(520), 1e-32 + torch.rand(520, generator=g) * 1e-33, magnitude)
    exact = keys.of(x.double() @ W.double().T)
    _, latents = launch_encode_topk(x, W, keys, 4, "float32", MEMORY)
    assert torch.equal(latents, exact.topk(4).indices.sort().values)


@pytest.mark.parametrize("precision", ["float32-int8", "bf16-int8"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_selections_through_the_screen_are_those_of_the_operands(precision: str, magnitude: bool) -> None:
    d, n, B, k = 96, 520, 6, 5
    x, W, b = case(d, n, B, torch.bfloat16 if precision == "bf16-int8" else torch.float32)
    x[1, 3] = torch.nan
    keys = Keys(b, torch.rand(n) + 0.5, magnitude)
    noise = torch.tensor(3)
    exact = keys.of(x.double() @ W.double().T + b.double())
    acts, latents = launch_encode_topk(x, W, keys, k, precision, MEMORY, noise=noise)
    kth = exact.nan_to_num(torch.inf).topk(k, 1).values[:, -1:]
    finite = torch.arange(B) != 1
    assert bool((exact.gather(1, latents) >= kth - 1e-5 * kth.abs())[finite].all())
    assert bool((latents.diff(dim=1) > 0).all())
    pre_acts = x.double() @ W.double().T + b.double()
    assert torch.allclose(acts[finite].double(), pre_acts.gather(1, latents)[finite], rtol=1e-5, atol=1e-5)
    rest = finite.nonzero()[:, 0]
    x = x[rest].contiguous()
    got = select.batch_topk(x, W, keys, k, precision, MEMORY, noise=noise)
    wanted = reference_batch_topk(x.double(), W.double(), keys, k, MEMORY[0])
    assert torch.equal(got[0].long(), wanted[0].long())
    assert torch.equal(got[1], wanted[1])
    if not magnitude:
        threshold = torch.full((1,), 0.5)
        got = select.above(x, W, b, threshold, None, precision, MEMORY, noise=noise)
        wanted = reference_above(x.double(), W.double(), b.double(), threshold.double(), None, MEMORY[0])
        assert torch.equal(got[0].long(), wanted[0].long())
        assert torch.equal(got[1], wanted[1])
        assert len(got[0]) > 10


def test_parts_and_blocks_change_no_bit() -> None:
    x, W, b = case(128, 200, 12, torch.float32)
    whole = launch_encode_topk(x, W, Keys(b), 3, "float32-int8", [1 << 30, 0], noise=torch.tensor(1))
    for memory in ([200 * 2 * 5, 0], [200 * 2 * 5, 64 * 128], [1, 1]):
        parts = launch_encode_topk(x, W, Keys(b), 3, "float32-int8", memory, noise=torch.tensor(1))
        assert all(torch.equal(one, other) for one, other in zip(whole, parts))


def test_small_products_are_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for B, n, d, k, in_bf16, in_float32 in (
        (4096, 4096, 384, 32, False, False),
        (4096, 16384, 4096, 128, False, False),
        (4096, 65536, 2048, 64, False, True),
        (8192, 131072, 4096, 64, True, True),
        (8192, 131072, 4096, 2048, False, False),
    ):
        assert screen.pays(B, n, d, k, rounds=True) is in_bf16
        assert screen.pays(B, n, d, k, rounds=False) is in_float32
    assert not screen.pays(8192, 131072, 4096, None, rounds=False), "bounds on either side leave too much open"
    assert not screen.pays(1 << 20, 1 << 20, 1 << 15, 8, rounds=True), (
        "so wide a row needs more shared memory than there is"
    )

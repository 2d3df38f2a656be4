"""All pre-activations above a threshold: the reference against dense float64, the kernels against both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops.select import reference
from flashsae.testing import integer_inputs, poison_empty
from helpers.on_both import DEVICE
from helpers.selection import HARD, float32_errors, hard_inputs, is_picked

pytest.importorskip("triton")

from flashsae.ops.select import above, launch

Selection = tuple[Tensor, Tensor, Tensor, Tensor]
PRECISIONS = ["bf16", "tf32", "float32"]
ROOMY = 1 << 20


def dense(x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor, capacity: int | None) -> Selection:
    pre_acts = x.double() @ W.double().T + bias.double()
    n = pre_acts.shape[1]
    chosen = ~(pre_acts <= threshold.double())
    room = int(chosen.sum()) if capacity is None else capacity
    places = chosen.flatten().nonzero()[:room, 0]
    latents, values = torch.full((room,), n, dtype=torch.int32), torch.zeros(room)
    latents[: len(places)], values[: len(places)] = (places % n).int(), pre_acts.flatten()[places].float()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).clamp(max=room).int()
    return latents, starts, values, chosen.sum()


def select(
    precision: str, x: Tensor, W: Tensor, bias: Tensor, by: Tensor, capacity: int | None, size: int
) -> Selection:
    if precision == "reference":
        return reference.above(x, W, bias, by, capacity, size)
    with poison_empty():
        result = launch.above(*(t.to(DEVICE) for t in (x, W, bias, by)), capacity, precision, [size, 0])
    return tuple(tensor.cpu() for tensor in result)


def named(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def assert_equal(ours: Selection, expected: Selection) -> None:
    for name, our, wanted in zip(("latents", "starts", "values", "count"), ours, expected):
        assert our.dtype == wanted.dtype, name
        torch.testing.assert_close(our, wanted, rtol=0, atol=0, equal_nan=True, msg=named(name))


def integers(B: int, d: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, bias = (integer_inputs(*shape, generator=generator, largest=2) for shape in ((B, d), (n, d), (n,)))
    return x, W, bias


SHAPES = [(0, 4, 9, 1), (1, 1, 1, 1), (3, 5, 33, 2), (4, 8, 70, 4), (17, 6, 64, 16)]  # B, d, n, rows at a time
# TF32 differs from bf16 in the type of the products only, so one shape is enough
CASES = [(*shape, how) for shape in SHAPES for how in ("reference", *PRECISIONS) if how != "tf32" or shape[2] == 33]


@pytest.mark.parametrize(("B", "d", "n", "rows", "precision"), CASES)
def test_t0_as_a_comparison_of_all(
    B: int, d: int, n: int, rows: int, precision: str, generator: torch.Generator
) -> None:
    x, W, bias = integers(B, d, n, generator)
    thresholds = torch.randint(-3, 9, (n if n != 33 else 1,), generator=generator).float()
    wanted = int(dense(x, W, bias, thresholds, None)[3])
    for capacity in {None, wanted // 2} if B > 3 else {None, 0, wanted, wanted + 5}:
        ours = select(precision, x, W, bias, thresholds, capacity, 2 * rows * (n + 7))
        assert_equal(ours, dense(x, W, bias, thresholds, capacity))


@pytest.mark.parametrize("precision", ["reference", "bf16", "float32"])
def test_strictly_above_and_with_empty_tokens(precision: str, generator: torch.Generator) -> None:
    x, W, _ = integers(5, 6, 40, generator)
    x[[0, 3]] = 0
    bias = torch.zeros(40)
    ours = select(precision, x, W, bias, torch.zeros(1), 300, ROOMY)
    assert_equal(ours, dense(x, W, bias, torch.zeros(1), 300))
    assert ours[1].diff()[[0, 3]].tolist() == [0, 0]
    for all_of_them in (torch.tensor([-1e30]), torch.tensor([-torch.inf])):
        assert int(select(precision, x, W, bias, all_of_them, 7, ROOMY)[3]) == 5 * 40
    assert int(select(precision, x, W, bias, torch.tensor([torch.inf]), 7, ROOMY)[3]) == 0


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_nan_is_above_everything(precision: str, generator: torch.Generator) -> None:
    x, W, bias = integers(4, 6, 50, generator)
    W[7, 3] = torch.nan
    x[2, 1] = torch.nan
    threshold = torch.full((50,), 100.0)
    threshold[9] = torch.nan
    latents, starts, values, count = select(precision, x, W, bias, threshold, None, ROOMY)
    assert starts.tolist() == [0, 2, 4, 54, 56]
    assert latents[:4].tolist() == [7, 9, 7, 9]
    assert latents[4:54].tolist() == list(range(50))
    assert values.isnan().tolist() == [True, False, True, False, *[True] * 50, True, False]
    assert int(count) == 56


@pytest.mark.parametrize("kind", HARD)
def test_t2_certified_float32_decides_as_float64_does(kind: str, generator: torch.Generator) -> None:
    x, W, bias = hard_inputs(kind, 8, 29, 100, generator)
    pre_acts, error = float32_errors(x, W, bias)
    threshold = pre_acts.median(0).values.float()  # where it is hardest to tell
    threshold[::2] = pre_acts[3, ::2].float()
    latents, starts, values, count = select("float32", x, W, bias, threshold, None, 2 * 104 * 5)
    picked = is_picked(latents, starts, 100)
    assert int(count) == len(latents) == int(picked.sum())
    assert not bool((picked & (pre_acts + error < threshold)).any())
    assert not bool((~picked & (pre_acts - error > threshold)).any())
    assert bool((values > threshold[latents.long()]).all())
    assert bool(((values.double() - pre_acts[picked]).abs() <= 2 * error[picked]).all())


def test_t3_two_runs_give_the_same_bits(generator: torch.Generator) -> None:
    inputs = hard_inputs("normal", 6, 20, 100, generator)
    for precision in ("bf16", "float32"):
        first, second = (select(precision, *inputs, torch.ones(1), 90, 2 * 104 * 4) for _ in range(2))
        assert_equal(first, second)


def test_more_entries_than_starts_can_count_are_refused(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(above, "LARGEST", 99)
    with pytest.raises(ShapeError, match=r"expected fewer than 2\*\*31 entries above it, got 100: use fewer tokens"):
        select("tf32", *integers(2, 3, 50, generator), torch.tensor([-1e9]), None, ROOMY)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("B", "d", "n"), [(1000, 96, 16384), (37, 70, 5001), (300, 64, 70000)])
def test_gpu_t0_at_real_sizes(B: int, d: int, n: int, precision: str, generator: torch.Generator) -> None:
    x, W, bias = integers(B, d, n, generator)
    threshold = torch.randint(20, 40, (n,), generator=generator).float()
    wanted = int(dense(x, W, bias, threshold, None)[3])
    for capacity in (None, wanted // 3, 2 * wanted):
        ours = select(precision, x, W, bias, threshold, capacity, 2 * n * (B // 3))
        assert_equal(ours, dense(x, W, bias, threshold, capacity))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_in_a_graph_with_other_inputs(precision: str, generator: torch.Generator) -> None:
    x, W, bias = (tensor.to(DEVICE) for tensor in hard_inputs("normal", 256, 128, 8192, generator))
    threshold = torch.full((1,), 30.0, device=DEVICE)

    def run() -> Selection:
        return launch.above(x, W, bias, threshold, 20_000, precision, [1 << 20, 0])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for size in (1.0, 0.1, 3.0):  # some, none, more than fit
        x.normal_().mul_(size)
        graph.replay()
        assert_equal(captured, run())

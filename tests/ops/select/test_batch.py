"""The B·k largest of a batch: the reference against dense float64, the kernels against both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashsae.ops.encode.keys import Keys
from flashsae.ops.select import reference
from flashsae.testing import integer_inputs, poison_empty, stable_topk
from helpers.on_both import DEVICE
from helpers.selection import HARD, batch_mistakes, hard_inputs, is_picked

pytest.importorskip("triton")

from flashsae.ops.select import batch, launch

Selection = tuple[Tensor, Tensor, Tensor]
PRECISIONS = ["bf16", "tf32", "float32"]
ROOMY = 1 << 20


def dense(x: Tensor, W: Tensor, bias: Tensor, scale: Tensor | None, k: int) -> Selection:
    """Sort all keys of the batch in float64, stably: so the first of equal ones wins."""
    pre_acts = x.double() @ W.double().T + bias.double()
    keys = pre_acts if scale is None else pre_acts * scale.double()
    n = keys.shape[1]
    _, best = stable_topk(keys.flatten(), len(x) * k)
    counts = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device).index_add_(0, best // n + 1, best**0)
    return (best % n).int(), counts.cumsum(0).int(), pre_acts.flatten()[best].float()


def select(precision: str, x: Tensor, W: Tensor, bias: Tensor, scale: Tensor | None, k: int, size: int) -> Selection:
    """Select with kernels, or with the reference; results on the CPU."""
    inputs = [None if t is None else t.to(DEVICE) for t in (x, W, bias, scale)]
    if precision == "reference":
        return reference.batch_topk(x, W, Keys(bias, scale), k, size)
    with poison_empty():
        result = launch.batch_topk(*inputs[:2], Keys(*inputs[2:]), k, precision, [size, 0])
    return tuple(tensor.cpu() for tensor in result)


def operands(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Keys]:
    return x, W, Keys(bias)


def named(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def assert_equal(ours: Selection, expected: Selection) -> None:
    for name, our, wanted in zip(("latents", "starts", "values"), ours, expected):
        assert our.dtype == wanted.dtype, name
        torch.testing.assert_close(our, wanted, rtol=0, atol=0, equal_nan=True, msg=named(name))


def integers(B: int, d: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, bias = (integer_inputs(*shape, generator=generator, largest=2) for shape in ((B, d), (n, d), (n,)))
    return x, W, bias


def force_redo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "capacity_of", lambda *_: 1)


SHAPES = [  # B, d, n, k, rows of float16 at a time
    (0, 4, 9, 2, 1),
    (1, 1, 1, 1, 1),
    (3, 5, 33, 33, 2),
    (5, 8, 70, 3, 5),
    (7, 13, 300, 2, 3),
]


# TF32 differs from bf16 in the type of the products only, so one shape is enough
CASES = [(*shape, how) for shape in SHAPES for how in ("reference", *PRECISIONS) if how != "tf32" or shape[2] == 300]


@pytest.mark.parametrize(("B", "d", "n", "k", "rows", "precision"), CASES)
def test_t0_as_a_stable_sort_of_all(
    B: int, d: int, n: int, k: int, rows: int, precision: str, generator: torch.Generator
) -> None:
    inputs = integers(B, d, n, generator)
    scale = torch.randint(0, 3, (n,), generator=generator).float() if n in (70, 33) else None
    assert_equal(select(precision, *inputs, scale, k, 2 * rows * n + 8 * rows), dense(*inputs, scale, k))


def test_t0_the_reference_at_any_size_and_in_float64(generator: torch.Generator) -> None:
    for B, n, k in ((37, 120, 5), (37, 41, 1), (4, 30, 29), (64, 64, 2)):
        inputs = integers(B, 6, n, generator)
        for size in (1, 8 * 4 * n * 5, ROOMY):
            assert_equal(select("reference", *inputs, None, k, size), dense(*inputs, None, k))
        _, _, values = reference.batch_topk(*operands(*(t.double() for t in inputs)), k, ROOMY)
        assert values.dtype == torch.float64


@pytest.mark.parametrize("precision", PRECISIONS)
def test_t0_the_way_out_gives_the_same(
    precision: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_redo(monkeypatch)
    used = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    x, W, bias = integers(18, 9, 140, generator)
    scale = torch.randint(0, 3, (140,), generator=generator).float() if precision == "bf16" else None
    assert_equal(select(precision, x, W, bias, scale, 3, ROOMY), dense(x, W, bias, scale, 3))
    launch.batch_topk(x.to(DEVICE), W.to(DEVICE), Keys(bias.to(DEVICE)), 3, precision, [ROOMY, 0], used)
    assert int(used) >= 18 * 3  # else it was not taken


def test_the_way_out_is_taken_only_where_it_must_be(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = integers(4, 6, 80, generator)
    expected = dense(*inputs, None, 2)
    monkeypatch.setattr(batch._Redo, "run", lambda *_, **__: None)
    assert_equal(select("bf16", *inputs, None, 2, ROOMY), expected)
    force_redo(monkeypatch)
    ours = select("bf16", *inputs, None, 2, ROOMY)
    assert not torch.equal(ours[0], expected[0])


def all_equal(x: Tensor, W: Tensor, bias: Tensor) -> None:
    x.copy_(x[:1].clone())
    W.copy_(W[:1].clone())
    bias.fill_(1)


def all_zero(x: Tensor, W: Tensor, bias: Tensor) -> None:
    x.zero_()
    bias.zero_()


def one_token_holds_nearly_all(x: Tensor, W: Tensor, bias: Tensor) -> None:
    x[1] *= 16
    W[:, 0] = W[:, 0].abs()


WAYS = [("reference", False), ("bf16", False), ("float32", False), ("bf16", True), ("float32", True)]


@pytest.mark.parametrize("spoil", [all_equal, all_zero, one_token_holds_nearly_all])
@pytest.mark.parametrize(("precision", "redo"), WAYS)
def test_t0_ties_and_skew(
    spoil: Callable[[Tensor, Tensor, Tensor], None], precision: str, redo: bool,
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if redo:
        force_redo(monkeypatch)
    inputs = integers(4, 5, 150, generator)
    spoil(*inputs)
    assert_equal(select(precision, *inputs, None, 60, 2 * 3 * 152), dense(*inputs, None, 60))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize(("precision", "redo"), WAYS[1:])
def test_nan_and_infinity_stay_visible(
    precision: str, redo: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redo:
        force_redo(monkeypatch)
    x, W, bias = integers(4, 6, 50, generator)
    W[7, 3] = torch.nan
    assert_equal(select(precision, x, W, bias, None, 2, ROOMY), select("reference", x, W, bias, None, 2, ROOMY))
    x[2, 1] = torch.nan
    x[3] = torch.inf
    latents, starts, values = select(precision, x, W, bias, None, 2, ROOMY)
    assert starts.tolist() == [0, 1, 2, 8, 8]  # latent 7 of each token, then the first of token 2
    assert latents.tolist() == [7, 7, *range(6)]
    assert bool(values.isnan().all())


@pytest.mark.parametrize("kind", HARD)
def test_t2_certified_float32_selects_as_float64_does(kind: str, generator: torch.Generator) -> None:
    x, W, bias = hard_inputs(kind, 10, 29, 120, generator)
    latents, starts, values = select("float32", x, W, bias, None, 4, 2 * 120 * 6)
    picked = is_picked(latents, starts, 120)
    assert int(picked.sum()) == 40
    assert batch_mistakes(x, W, bias, picked) == 0
    exact = (x.double() @ W.double().T + bias.double())[picked]
    error = 5e-7 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1))[picked] + 1e-6 * exact.abs() + 1e-43
    assert bool(((values.double() - exact).abs() <= error).all())


def test_t2_the_count_of_mistakes_can_fail(generator: torch.Generator) -> None:
    x, W, bias = hard_inputs("normal", 10, 29, 120, generator)
    pre_acts = x.double() @ W.double().T + bias.double()
    picked = pre_acts >= pre_acts.flatten().topk(40).values[-1]
    assert batch_mistakes(x, W, bias, picked) == 0
    picked.view(-1)[pre_acts.argmax()] = False
    picked.view(-1)[pre_acts.argmin()] = True
    assert batch_mistakes(x, W, bias, picked) == 1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("size", [1 << 12, ROOMY])
def test_places_that_are_counted_and_not_taken_are_not_selected(
    precision: str, size: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that is rounded otherwise in the kernel that counts may reach there, and not where it is written."""
    x, W = integer_inputs(24, 7, generator=generator), integer_inputs(300, 7, generator=generator)
    bias = integer_inputs(300, generator=generator)
    expected = select(precision, x, W, bias, None, 5, size)
    counts, left = batch.kernels.select_reach_kernel, 0

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*args: object, SPAN: int, **tile: object) -> None:
                nonlocal left
                counts[grid](*args, SPAN=SPAN, **tile)
                reach, sums = args[8], args[9]
                assert isinstance(reach, Tensor)
                assert isinstance(sums, Tensor)
                more = torch.arange(len(reach), dtype=torch.int32, device=reach.device) % 3
                reach += more
                sums.index_add_(0, torch.arange(len(reach), device=reach.device) // SPAN, more.long())
                left += int(more.sum())

            return run

    empty_list = batch._List.of

    def list_of_garbage(*args: object) -> object:
        result = empty_list(*args)  # type: ignore[arg-type]
        for numbers in (result.keys, result.other, result.latents):
            numbers.fill_(2**31 - 1)
        return result

    monkeypatch.setattr(batch._List, "of", list_of_garbage)
    monkeypatch.setattr(batch.kernels, "select_reach_kernel", Counting())
    assert_equal(select(precision, x, W, bias, None, 5, size), expected)
    assert left


def test_t3_two_runs_give_the_same_bits(generator: torch.Generator) -> None:
    inputs = hard_inputs("normal", 6, 20, 100, generator)
    for precision in ("bf16", "float32"):
        first, second = (select(precision, *inputs, None, 3, 2 * 104 * 4) for _ in range(2))
        assert_equal(first, second)


class Largest(TorchDispatchMode):
    """The most bytes that any result of an operation takes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("precision", ["reference", "bf16"])
def test_the_pre_activations_never_exist_in_full(precision: str, generator: torch.Generator) -> None:
    B, d, n, k, size = 40 if precision == "reference" else 6, 4, 40_000, 2, 8 * 40_000
    inputs = hard_inputs("normal", B, d, n, generator)
    with Largest() as largest:
        select(precision, *inputs, None, k, size)
    # rows of weights (in float32), histograms and the workspace, whatever B is; lists of k entries a token beside them
    assert largest.bytes <= max(4 * n * d, 8 * 65537, 8 * n, 64 * B * k + 8192)


@pytest.mark.gpu
@pytest.mark.parametrize("redo", [False, True], ids=["list", "way out"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("B", "d", "n", "k"), [(1000, 96, 16384, 32), (37, 70, 5001, 300), (513, 64, 40000, 8)])
def test_gpu_t0_at_real_sizes(
    B: int, d: int, n: int, k: int, precision: str, redo: bool,
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if redo:
        force_redo(monkeypatch)
    inputs = [tensor.to(DEVICE) for tensor in integers(B, d, n, generator)]
    expected = dense(*inputs, None, k)
    used = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for size in (2 * n * (B // 3), 1 << 29):
        assert_equal(launch.batch_topk(*operands(*inputs), k, precision, [size, 0], used), expected)
        print(f"{int(used)} candidates for {B * k}")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_memory_is_bounded(precision: str, generator: torch.Generator) -> None:
    B, d, n, k, size = 4096, 64, 65536, 16, 1 << 24
    inputs = [tensor.to(DEVICE) for tensor in hard_inputs("normal", B, d, n, generator)]
    launch.batch_topk(
        *operands(*(tensor[:9] for tensor in inputs)), 1, precision, [size, 0]
    )  # what cuBLAS takes for good
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    launch.batch_topk(*operands(*inputs), k, precision, [size, 0])
    taken = torch.cuda.max_memory_allocated() - before
    # the workspace, maxima of groups, entries (at most 16 bytes, 18 times k), operands in float16; all: 512 MB
    assert taken <= 2 * size + 18 * 16 * B * k + 2 * (B + n) * d + 16 * n + (8 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HARD)
def test_gpu_t2_certified_at_real_sizes(kind: str, generator: torch.Generator) -> None:
    inputs = [tensor.to(DEVICE) for tensor in hard_inputs(kind, 512, 768, 16384, generator)]
    latents, starts, _ = launch.batch_topk(*operands(*inputs), 32, "float32", [1 << 22, 0])
    assert batch_mistakes(*inputs, is_picked(latents, starts, 16384)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("redo", [False, True], ids=["list", "way out"])
def test_gpu_in_a_graph_with_other_inputs(
    precision: str, redo: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redo:
        force_redo(monkeypatch)
    x, W, bias = (tensor.to(DEVICE) for tensor in hard_inputs("normal", 256, 128, 8192, generator))

    def run() -> Selection:
        return launch.batch_topk(x, W, Keys(bias), 16, precision, [1 << 20, 0])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_equal(captured, run())

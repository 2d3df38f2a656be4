from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops import (
    FactoredGradient,
    collect_factors,
    decode,
    decode_loss,
    encode_topk,
    latent_rows,
    materialize,
    take_rows,
)
from flashsae.ops.factors import Factor, RowFactor, RowGradient, SparseFactor
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.codes import index_of, topk_of
from helpers.steps import Tensors, leaves

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
B, D, N, K = 17, 24, 64, 3  # numbers take more memory than the factors of two passes


def _operands(generator: torch.Generator, dtype: torch.dtype = F32) -> Tensors:
    shapes = {"W": (N, D), "x": (B, D), "acts": (B, K), "latent_bias": (N,), "bias": (D,)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _code(generator: torch.Generator, tokens: int = B, k: int = K) -> Tensor:
    return torch.rand(tokens, N, generator=generator).topk(k).indices


def factors_of(parameter: Tensor) -> tuple[Factor, ...]:
    assert isinstance(parameter.grad, FactoredGradient)
    assert parameter.grad.factors is not None
    return parameter.grad.factors


def gradient_of(parameter: Tensor) -> RowGradient:
    return RowGradient.of(factors_of(parameter))


LATENTS = torch.tensor([7, 2, 9, 0])
SLOTS = torch.full((N,), -1, dtype=torch.int32)
SLOTS[LATENTS[:3]] = torch.arange(3, dtype=torch.int32)  # the last row stands for no latent

OPERATIONS: dict[str, Callable[[Tensors, Tensor], Tensor]] = {
    "encode_topk": lambda p, code: encode_topk(p["x"], p["W"], p["latent_bias"], K, b_dec=p["bias"]).acts,
    "decode": lambda p, code: decode(topk_of(p["acts"], code, p["W"]), p["W"], p["bias"]),
    "decode_loss": lambda p, code: decode_loss(topk_of(p["acts"], code, p["W"]), p["W"], p["bias"], p["x"]).loss,
    "take_rows": lambda p, code: take_rows(p["W"], LATENTS, SLOTS),
}


def _backward(name: str, inputs: Tensors, code: Tensor, *, collect: bool, times: int = 1) -> Tensors:
    """Return the parameters after backward passes."""
    p = leaves(inputs)
    if collect:
        collect_factors(p["W"])
    with poison_empty():
        for number in range(times):
            result = OPERATIONS[name](p, code)
            upstream = torch.linspace(-1, 1 + number, result.numel(), dtype=result.dtype).view(result.shape)
            result.backward(upstream)
    return p


# the interpreter of Triton does not round to bfloat16 as PyTorch does, so kernels are compared in float32
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", F32), ("reference", BF16), ("reference", F64), ("triton", F32)]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_leaves_a_factor_that_materializes_as_the_ordinary_gradient(
    name: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", backend)
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    inputs, code = _operands(generator, dtype), _code(generator)
    ordinary, collected = (_backward(name, inputs, code, collect=collect) for collect in (False, True))
    (factor,) = factors_of(collected["W"])
    assert isinstance(factor, RowFactor if name == "take_rows" else SparseFactor)
    materialize(collected.values())
    assert type(collected["W"].grad) is Tensor
    for other, parameter in ordinary.items():
        if parameter.grad is None:
            assert collected[other].grad is None
        else:
            assert torch.equal(collected[other].grad, parameter.grad), other  # type: ignore[arg-type]
            assert collected[other].grad.dtype == dtype, other  # type: ignore[union-attr]
    assert type(ordinary["W"].grad) is Tensor


@pytest.mark.parametrize("name", OPERATIONS)
def test_ordinary_gradients_and_factors_accumulate_in_either_order(name: str, generator: torch.Generator) -> None:
    inputs, code = _operands(generator), _code(generator)
    before = integer_inputs(N, D, generator=generator)
    ordinary, collected = (_backward(name, inputs, code, collect=collect, times=2) for collect in (False, True))
    assert len(factors_of(collected["W"])) == 2
    ordinary["W"].grad += before  # type: ignore[operator]
    collected["W"].grad += before.clone()  # type: ignore[operator]
    last = leaves(inputs)
    collect_factors(last["W"])
    last["W"].grad = before.clone()
    for number in range(2):
        result = OPERATIONS[name](last, code)
        upstream = torch.linspace(-1, 1 + number, result.numel(), dtype=result.dtype).view(result.shape)
        result.backward(upstream)
    for p in (collected, last):
        materialize([p["W"]])
        torch.testing.assert_close(p["W"].grad, ordinary["W"].grad)


def test_materialize_leaves_others_alone() -> None:
    collecting, other = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    collect_factors(collecting)
    other.grad = torch.ones(4, 3)
    materialize([collecting, other])
    assert collecting.grad is None
    assert other.grad.tolist() == [[1.0] * 3] * 4


def test_operations_that_know_no_factors_leave_ordinary_gradients(generator: torch.Generator) -> None:
    W = torch.randn(N, D, generator=generator).requires_grad_()
    collect_factors(W)
    W.square().sum().backward()
    assert type(W.grad) is Tensor
    assert torch.equal(W.grad, 2 * W.detach())


def test_small_batches_accumulate_to_the_sum_over_one_large_one(generator: torch.Generator) -> None:
    tokens, d, d_sae = 3 * RUN + 50, 64, 10 * N  # so many latents that numbers would take more memory than factors
    acts, target = torch.rand(tokens, K, generator=generator), torch.randn(tokens, d, generator=generator)
    code = _code(generator, tokens)
    code[:, 0] = 5  # a run that is cut into pieces
    start = torch.randn(d_sae, d, generator=generator)
    totals = []
    for size in (tokens, 100):
        W = start.clone().requires_grad_()
        collect_factors(W)
        for part in torch.arange(tokens).split(size):
            decode_loss(topk_of(acts[part], code[part], W), W, None, target[part]).loss.backward()
        totals.append(gradient_of(W).total(start))
    assert torch.equal(*totals)
    dense = []
    for dtype in (F32, F64):
        W = start.to(dtype, copy=True).requires_grad_()
        x_hat = torch.zeros(tokens, d_sae, dtype=dtype).scatter_add(1, code, acts.to(dtype)) @ W
        (target.to(dtype) - x_hat).square().sum().backward()
        dense.append(W.grad)
    assert_as_accurate(totals[1], *dense)  # type: ignore[arg-type]


def test_codes_of_different_k_are_joined(generator: torch.Generator) -> None:
    """Each is summed with its own tokens, and what fills up the narrow ones adds nothing to latent 0."""
    W, factors = torch.zeros(N, D), []
    expected = torch.zeros(N, D)
    for tokens, k, dtype in ((4, 1, BF16), (9, 5, F32), (6, 2, BF16)):
        index = index_of(_code(generator, tokens, k).clamp_min(1), N)
        acts, rows = integer_inputs(tokens, k, generator=generator), integer_inputs(tokens, D, generator=generator)
        factors.append(SparseFactor(index, acts, rows.to(dtype)))
        expected += latent_rows(index, acts, rows)
    gradient = RowGradient.of(factors)
    assert gradient.dense is None
    assert gradient.sparse is not None
    assert gradient.sparse.coeffs.shape == (19, 5)
    assert gradient.sparse.rows.dtype == F32
    assert torch.equal(gradient.total(W.detach()), expected)
    assert expected[0].tolist() == [0.0] * D


@pytest.mark.parametrize("same_slots", [True, False])
@pytest.mark.parametrize("besides", ["nothing", "all rows"])
def test_row_factors_keep_their_slots_only_where_all_parts_share_them(
    besides: str, same_slots: bool, generator: torch.Generator
) -> None:
    W = torch.zeros(N, D, requires_grad=True)
    collect_factors(W)
    code, acts = _code(generator), integer_inputs(B, K, generator=generator)
    rows = integer_inputs(B, D, generator=generator)
    decode(topk_of(acts, code, W), W).backward(rows)
    expected = latent_rows(index_of(code, N), acts, rows)
    factors = list(factors_of(W))
    W.grad = None
    for shift in (0, 0 if same_slots else 1):
        upstream = integer_inputs(4, D, generator=generator)
        take_rows(W, LATENTS + shift, SLOTS.roll(1) if shift else SLOTS).backward(upstream)
        factors += factors_of(W)
        W.grad = None
        expected[LATENTS[:3] + shift] += upstream[:3]
    if besides != "nothing":
        more = integer_inputs(N, D, generator=generator)
        expected += more
        factors.append(RowFactor(more, None))
    gradient = RowGradient.of(factors)
    assert gradient.sparse is not None
    assert (gradient.slots is SLOTS) == (same_slots and besides == "nothing")
    assert gradient.dense is not None
    assert gradient.dense.shape == ((4, D) if gradient.slots is not None else (N, D))
    assert torch.equal(gradient.total(W.detach()), expected)


@pytest.mark.parametrize("slots", [SLOTS, None], ids=["some rows", "all rows"])
def test_narrow_rows_are_added_in_float32(slots: Tensor | None, generator: torch.Generator) -> None:
    """As the parts of a sparse gradient are: an accumulated gradient must not be rounded at every part."""
    factors = [RowFactor(torch.randn(N, D, generator=generator).to(BF16), slots) for _ in range(5)]
    expected = torch.stack([factor.dense() for factor in factors])
    assert expected.dtype == F32
    torch.testing.assert_close(RowGradient.of(factors).total(torch.zeros(N, D)), expected.sum(0))


def test_no_part_is_a_gradient_of_zero() -> None:
    W = torch.ones(N, D, dtype=BF16)
    assert RowGradient.of([]) == RowGradient()
    assert torch.equal(RowGradient().total(W), torch.zeros_like(W))


@pytest.mark.parametrize("name", ["encode_topk", "decode", "decode_loss"])
def test_what_is_dense_enough_is_multiplied_and_left_as_rows(
    name: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    inputs = {n: integer_inputs(*t.shape, generator=generator, largest=1) for n, t in _operands(generator).items()}
    code = _code(generator)
    results = []
    for limit, collect in (("1", True), ("0", True), ("0", False)):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", limit)
        p = leaves(inputs)
        if collect:
            collect_factors(p["W"])
        result = OPERATIONS[name](p, code)
        result.backward(torch.arange(result.numel(), dtype=F32).view(result.shape) % 5)
        if collect:
            (factor,) = factors_of(p["W"])
            assert isinstance(factor, RowFactor) == (limit == "0")
            assert isinstance(factor, SparseFactor) or factor.slots is None
            gradient = gradient_of(p["W"])
            assert (gradient.sparse is None, gradient.dense is None) == (limit == "0", limit == "1")
            materialize(p.values())
        results.append({n: t.grad for n, t in p.items() if t.grad is not None})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for n, expected in results[0].items():
            assert torch.equal(other[n], expected), n


def test_taken_rows_are_copies_and_their_gradient_is_that_of_indexing(generator: torch.Generator) -> None:
    W = torch.randn(N, D, generator=generator).requires_grad_()
    rows = take_rows(W, LATENTS, SLOTS)
    assert torch.equal(rows, W[LATENTS])
    upstream = torch.randn(4, D, generator=generator)
    upstream[3] = 0.0  # what indexing would add to latent 0
    (ours,) = torch.autograd.grad(rows, W, upstream)
    (theirs,) = torch.autograd.grad(W[LATENTS], W, upstream)
    assert torch.equal(ours, theirs)


def test_a_row_that_stands_for_no_latent_passes_no_gradient() -> None:
    W = torch.zeros(N, D, requires_grad=True)
    take_rows(W, LATENTS, SLOTS).backward(torch.ones(4, D))
    assert W.grad is not None
    assert W.grad[:, 0].nonzero()[:, 0].tolist() == [2, 7, 9]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match=r"weights: expected the shape \[d_sae, d\], got \[64\]"):
        take_rows(torch.zeros(N), LATENTS, SLOTS)
    with pytest.raises(ShapeError, match=r"slots: expected the shape \[64\], got \[63\]"):
        take_rows(torch.zeros(N, D), LATENTS, SLOTS[1:])

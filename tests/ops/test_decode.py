from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops import SparseCode, decode, decode_loss
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.codes import topk_of

SHAPES = [(0, 2, 5, 3), (1, 1, 1, 1), (37, 3, 101, 13), (64, 33, 40, 24), (130, 7, 16, 9)]
NAMES = ("top_acts", "W_dec", "b_dec")


def _dense(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    latent_acts = W_dec.new_zeros(len(top_acts), len(W_dec)).scatter_add(1, top_indices.long(), top_acts)
    return latent_acts @ W_dec + b_dec


def _decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    return decode(SparseCode.topk(top_acts, top_indices, len(W_dec)), W_dec, b_dec)


def _indices(B: int, k: int, d_sae: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, d_sae, (B, k), generator=generator)  # with repeats, which must add up


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("B", "k", "d_sae", "d_in"), SHAPES)
def test_t0_integers_are_bitwise_equal(
    B: int, k: int, d_sae: int, d_in: int, index_dtype: torch.dtype, generator: torch.Generator
) -> None:
    top_indices = _indices(B, k, d_sae, generator).to(index_dtype)
    p = {
        "top_acts": integer_inputs(B, k, generator=generator),
        "W_dec": integer_inputs(d_sae, d_in, generator=generator),
        "b_dec": integer_inputs(d_in, generator=generator),
    }
    for tensor in p.values():
        tensor.requires_grad_()
    upstream = integer_inputs(B, d_in, generator=generator)
    with poison_empty():
        ours = _decode(p["top_acts"], top_indices, p["W_dec"], p["b_dec"])
        our_grads = torch.autograd.grad(ours, [p[n] for n in NAMES], upstream)
    theirs = _dense(p["top_acts"], top_indices, p["W_dec"], p["b_dec"])
    their_grads = torch.autograd.grad(theirs, [p[n] for n in NAMES], upstream)
    assert torch.equal(ours, theirs)
    for name, a, b in zip(NAMES, our_grads, their_grads):
        assert torch.equal(a, b), name


def test_t1_as_accurate_as_dense_autograd(generator: torch.Generator) -> None:
    B, k, d_sae, d_in = 700, 9, 50, 40
    top_indices = torch.rand(B, d_sae, generator=generator).topk(k, dim=1).indices
    p = {
        "top_acts": torch.rand(B, k, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator),
        "b_dec": torch.randn(d_in, generator=generator),
    }
    upstream = torch.randn(B, d_in, generator=generator)

    def run(function: object, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = {n: t.to(dtype).requires_grad_() for n, t in p.items()}
        out = function(q["top_acts"], top_indices, q["W_dec"], q["b_dec"])  # type: ignore[operator]
        return out, torch.autograd.grad(out, [q[n] for n in NAMES], upstream.to(dtype))

    ours, our_grads = run(_decode, torch.float32)
    theirs, their_grads = run(_dense, torch.float32)
    exact, exact_grads = run(_dense, torch.float64)
    assert_as_accurate(ours, theirs, exact, "x_hat")
    for name, a, b, c in zip(NAMES, our_grads, their_grads, exact_grads):
        assert_as_accurate(a, b, c, f"grad {name}")


def test_bfloat16_is_accumulated_in_float32_and_rounded_once(generator: torch.Generator) -> None:
    top_indices = _indices(20, 16, 60, generator)
    top_acts = torch.rand(20, 16, generator=generator)
    W_dec = torch.randn(60, 30, generator=generator).bfloat16()
    x_hat = _decode(top_acts, top_indices, W_dec)
    exact = (W_dec.double()[top_indices] * top_acts.double()[..., None]).sum(1)
    assert x_hat.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((x_hat.double() - exact).abs() <= exact.abs() * rounding * 1.01 + 1e-5).all())


def test_without_bias(generator: torch.Generator) -> None:
    top_acts, top_indices = torch.ones(2, 1), torch.tensor([[1], [0]])
    assert _decode(top_acts, top_indices, torch.eye(2)).tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "k", "d_sae", "d_in"), SHAPES)
def test_t0_loss_of_integers_is_bitwise_that_of_autograd(
    B: int, k: int, d_sae: int, d_in: int, dtype: torch.dtype, weighted: bool, generator: torch.Generator
) -> None:
    top_indices = _indices(B, k, d_sae, generator)
    shapes = {"top_acts": (B, k), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "target": (B, d_in)}
    p = {n: integer_inputs(*s, generator=generator, largest=2, dtype=dtype) for n, s in shapes.items()}
    for tensor in p.values():
        tensor.requires_grad_()
    weights = integer_inputs(B, generator=generator, dtype=dtype).abs() if weighted else None
    with poison_empty():
        code = topk_of(p["top_acts"], top_indices, p["W_dec"])
        ours = decode_loss(code, p["W_dec"], p["b_dec"], p["target"], token_weights=weights)
        our_grads = torch.autograd.grad(3 * ours.loss, list(p.values()))
    x_hat = _dense(p["top_acts"], top_indices, p["W_dec"], p["b_dec"])
    errors = (p["target"] - x_hat).square().sum(1)
    loss = (errors if weights is None else weights * errors).sum()
    assert torch.equal(ours.loss, loss)
    assert torch.equal(ours.x_hat, x_hat)
    assert torch.equal(ours.residual, p["target"] - x_hat)
    assert not ours.x_hat.requires_grad
    for name, a, b in zip(p, our_grads, torch.autograd.grad(3 * loss, list(p.values()))):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_acts": torch.zeros(3, 3)}, ShapeError, r"top_acts: expected the shape \[3, 2\], got \[3, 3\]"),
        ({"top_indices": torch.zeros(3, 2)}, DtypeError, r"top_indices: expected int32 or int64, got torch.float32"),
        ({"top_indices": torch.full((3, 2), 5)}, ShapeError, r"expected every index in \[0, 5\), got values from 5"),
        ({"top_indices": torch.full((3, 2), -1)}, ShapeError, r"expected every index in \[0, 5\), got values from -1"),
        ({"W_dec": torch.zeros(5)}, ShapeError, r"W_dec: expected the shape \[5, d_in\], got \[5\]"),
        ({"b_dec": torch.zeros(5)}, ShapeError, r"b_dec: expected the shape \[4\], got \[5\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {
        "top_acts": torch.zeros(3, 2),
        "top_indices": torch.zeros(3, 2, dtype=torch.int64),
        "W_dec": torch.zeros(5, 4),
        "b_dec": torch.zeros(4),
    }
    with pytest.raises(error, match=message):
        _decode(**{**good, **change})

from __future__ import annotations

import pytest
import torch

from flashsae.architectures.batch_topk import BatchTopKSettings
from flashsae.bench.problem import dense_code, dense_squared_error, make_problem
from flashsae.bench.setups import Shape, arch_settings, tiny
from flashsae.testing import dense_batch_topk

CPU, SHAPE = torch.device("cpu"), Shape("x", 40, 12, 100, 5)


def test_the_same_seed_draws_the_same_problem() -> None:
    a, b = (make_problem(SHAPE, torch.float32, CPU, seed=3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip((*a.weights, *a.xs), (*b.weights, *b.xs)))
    assert not torch.equal(a.W_dec, make_problem(SHAPE, torch.float32, CPU, seed=4).W_dec)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(100))
    assert not torch.equal(a.x(0), a.x(1))
    assert a.x(2) is a.x(0)


def test_tied_weights_share_memory_unless_latents_are_dead() -> None:
    tied = make_problem(SHAPE, torch.float32, CPU, tied=True)
    assert tied.W_enc_T is tied.W_dec
    dead = make_problem(SHAPE, torch.float32, CPU, tied=True, dead=30)
    torch.testing.assert_close(dead.W_dec, tied.W_dec)
    torch.testing.assert_close(dead.W_enc_T[30:], dead.W_dec[30:])
    assert int(dense_code(dead, 0).top_indices.min()) >= 30


def test_the_squared_error_is_that_of_float64() -> None:
    problem = make_problem(SHAPE, torch.float32, CPU)
    W_enc_T, b_enc, W_dec, b_dec = (weight.double() for weight in problem.weights)
    x = problem.xs[0].double()
    top = ((x - b_dec) @ W_enc_T.T + b_enc).topk(5, dim=1)
    code = torch.zeros(40, 100, dtype=torch.float64).scatter(1, top.indices, top.values.relu())
    error = float((code @ W_dec + b_dec - x).square().sum())
    assert dense_squared_error(problem) == pytest.approx(error, rel=1e-6)


def test_tiny_keeps_the_order_of_sizes() -> None:
    small, large = tiny(Shape("S", 4096, 768, 24576, 32)), tiny(Shape("L", 8192, 4096, 131072, 64))
    assert small.d_in < large.d_in
    assert small.d_sae < large.d_sae
    assert small.k < large.k
    assert large.k <= large.d_sae < 1000


def test_the_squared_error_is_that_of_the_architecture() -> None:
    problem = make_problem(SHAPE, torch.float32, CPU, arch="batch_topk")
    params = {name: value.double() for name, value in problem.params.items()}
    x = problem.xs[0].double()
    latent_acts = dense_batch_topk(x, params["W_enc_T"], params["b_enc"], 5, params["b_dec"])
    error = float((latent_acts @ params["W_dec"] + params["b_dec"] - x).square().sum())
    assert dense_squared_error(problem) == pytest.approx(error, rel=1e-6)
    assert problem.arch == arch_settings("batch_topk", SHAPE) == BatchTopKSettings(k=5)
    assert dense_squared_error(make_problem(SHAPE, torch.float32, CPU)) != pytest.approx(error, rel=1e-3)

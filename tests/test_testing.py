from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae import Term
from flashsae.architecture import architecture_named, description
from flashsae.errors import ConfigError
from flashsae.testing import (
    ORACLES,
    DenseTrainer,
    UnitNormAdam,
    chosen,
    dense_abs_topk,
    dense_auxk,
    dense_batch_topk,
    dense_topk,
    oracle,
    stable_topk,
)

EYE = torch.eye(3, dtype=torch.float64)
NO_BIAS = torch.zeros(3, dtype=torch.float64)


SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "abs_topk": {"k": 3},
    "jump_relu": {"target_l0": 3.0, "penalty": "l0", "bandwidth": 0.5},
    "matryoshka": {"k": 3},
    "matryoshka:topk": {"k": 3},
    "hierarchical_topk": {"k": 3},
}
"""Of each architecture, for 12 latents of width 5."""

NOT_DIFFERENTIABLE = {"jump_relu"}
"""Oracles with a straight-through estimator, which is no derivative of what they compute."""


def _params(generator: torch.Generator, name: str = "topk") -> dict[str, Tensor]:
    rows = [row for row in architecture_named(name).parameters if row.trained]
    sizes = {"d_in": 5, "d_out": 5, "d_sae": 12}
    params = {row.name: torch.randn(*row.sizes(sizes), generator=generator, dtype=torch.float64) for row in rows}
    return {**params, "W_dec": torch.nn.functional.normalize(params["W_dec"], dim=1)}


def test_of_equal_values_the_lowest_index_is_chosen() -> None:
    values, places = stable_topk(torch.tensor([[1.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]]), 3)
    assert places.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert values.tolist() == [[1.0, 2.0, 2.0], [5.0, 5.0, 5.0]]


def test_latents_of_a_token_by_hand() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    assert dense_topk(x, EYE, NO_BIAS, 2).tolist() == [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert dense_topk(x, EYE, NO_BIAS, 1, x[0]).tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert dense_topk(x, EYE, NO_BIAS + 9, 1).tolist() == [[12.0, 0.0, 0.0], [8.0, 0.0, 0.0]]


def test_latents_of_a_batch_are_shared_out_by_size_whichever_token_has_them() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [0.5, 1.0, -3.0]], dtype=torch.float64)
    assert dense_batch_topk(x, EYE, NO_BIAS, 1).tolist() == [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert dense_batch_topk(x, EYE, NO_BIAS, 2).tolist() == [[3.0, 1.0, 2.0], [0.0, 1.0, 0.0]]
    ties = torch.ones(2, 3, dtype=torch.float64)
    assert dense_batch_topk(ties, EYE, NO_BIAS, 2).tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_latents_that_are_largest_by_magnitude_keep_their_signs() -> None:
    x = torch.tensor([[3.0, 1.0, -4.0], [-2.0, 2.0, 2.0]], dtype=torch.float64)
    assert dense_abs_topk(x, EYE, NO_BIAS, 2).tolist() == [[3.0, 0.0, -4.0], [-2.0, 2.0, 0.0]]


@pytest.mark.parametrize("name", ORACLES)
def test_every_oracle_is_differentiable_in_all_of_the_encoder(name: str, generator: torch.Generator) -> None:
    params = {key: value.requires_grad_() for key, value in _params(generator, name).items()}
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    encoder = {key: params[key] for key in oracle(name).params}

    def latents(x: Tensor, *values: Tensor) -> Tensor:
        return oracle(name)(x, dict(zip(encoder, values)), **SETTINGS.get(name, {}))

    found = latents(x, *encoder.values())
    assert found.shape == (4, 12)
    assert found.dtype == torch.float64
    assert (found != 0).any()
    grads = torch.autograd.grad(found.square().sum(), [x, *encoder.values()])
    assert all(grad.isfinite().all() for grad in grads)
    assert name in NOT_DIFFERENTIABLE or torch.autograd.gradcheck(latents, [x, *encoder.values()])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected one of topk, batch_topk.*, got 'l1'"):
        oracle("l1")


def test_a_given_selection_is_taken_as_it_is(generator: torch.Generator) -> None:
    params, x = _params(generator), torch.randn(4, 5, generator=generator, dtype=torch.float64)
    places = torch.tensor([[0, 11]]).expand(4, 2)
    found = dense_topk(x, params["W_enc_T"], params["b_enc"], 2, topk=chosen(places))
    expected = (x @ params["W_enc_T"].T + params["b_enc"])[:, places[0]].relu()
    torch.testing.assert_close(found[:, places[0]], expected)
    assert not found[:, 1:11].any()


def test_dead_latents_alone_explain_the_residual(generator: torch.Generator) -> None:
    params, x = _params(generator), torch.randn(4, 5, generator=generator, dtype=torch.float64)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 7]] = True
    both = [(x - params["b_dec"]) @ params["W_enc_T"][i] + params["b_enc"][i] for i in (2, 7)]
    x_hat = sum(acts.relu()[:, None] * params["W_dec"][i] for acts, i in zip(both, (2, 7)))
    expected = (x - x_hat).square().sum()
    torch.testing.assert_close(dense_auxk(x, params, x, dead, 2), expected)
    torch.testing.assert_close(dense_auxk(x, params, x, dead, 9), expected)
    assert dense_auxk(x, params, x, dead, 1) != expected


def test_the_decoder_gradient_is_projected_before_adam(generator: torch.Generator) -> None:
    start = torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1)
    across = torch.randn(4, 6, generator=generator)
    across -= (across * start).sum(1, keepdim=True) * start
    W, expected = start.clone().requires_grad_(), start.clone().requires_grad_()
    W.grad, expected.grad = across + 5 * start, across
    UnitNormAdam([W], W, 0.01).step(0.02)
    torch.optim.Adam([expected], 0.02, eps=6.25e-10).step()
    torch.testing.assert_close(W.detach(), torch.nn.functional.normalize(expected.detach(), dim=1))
    assert W.grad is None


@pytest.mark.parametrize("name", ORACLES)
def test_a_dense_training_learns_and_keeps_the_decoder_at_unit_norm(name: str, generator: torch.Generator) -> None:
    params, x = _params(generator, name), torch.randn(64, 5, generator=generator, dtype=torch.float64)
    before = {key: value.clone() for key, value in params.items()}
    trainer = DenseTrainer(params, 1e-2, 5.0, name, **SETTINGS.get(name, {}))
    term = next(iter(oracle(name).terms))
    first = trainer.losses(x)[term].detach()
    torch.testing.assert_close(trainer.losses(x, x.clone())[term].detach(), first)
    losses = [float(trainer.step(x)) for _ in range(20)]
    if list(oracle(name).terms) == ["fvu"]:
        x_hat = oracle(name)(x, params, **SETTINGS.get(name, {})) @ params["W_dec"] + params["b_dec"]
        assert losses[0] == pytest.approx(float((x - x_hat).square().sum()) / (64 * 5.0))
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(trainer.params["W_dec"].norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert all(torch.equal(params[key], before[key]) for key in params)  # they were copied


def test_terms_are_weighted_by_their_settings(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = _params(generator), torch.randn(6, 5, generator=generator, dtype=torch.float64)
    size = Term("size", "mean |acts|", "How large codes are.", lambda step: None, weight="k")
    listed = replace(architecture_named("topk"), terms=(*architecture_named("topk").terms, size))
    terms = {**oracle("topk").terms, "size": lambda step: step.latent_acts.abs().mean() * step.settings.ramp}
    monkeypatch.setitem(ORACLES, "topk", replace(oracle("topk"), terms=terms))
    monkeypatch.setitem(description._REGISTERED, "topk", listed)
    trainer = DenseTrainer(params, 1e-2, 5.0, k=3)
    expected = trainer.fvu(x, trainer.encode(x)) + 3 * 0.5 * trainer.encode(x).abs().mean()
    torch.testing.assert_close(trainer.step(x, ramp=0.5), expected.detach())

"""The auxiliary loss as other libraries have it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flashsae import SAE, SAEConfig, TrainConfig, ops
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError
from flashsae.sae import DeadLatents, DeadRows, Step, fvu_weights
from flashsae.sae.dead import LEAST_RESIDUAL, auxk_loss
from flashsae.settings.training import AuxK
from flashsae.testing import AUXK, assert_as_accurate, dense_decode, dense_topk
from flashsae.train import init_state, train_step

D, N, K, B = 6, 30, 4, 13
FORMS = get_args(AuxK)
VARIANCE = 2.5
Tensors = dict[str, Tensor]


def _params(dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc_T": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["b_enc"] -= 0.5  # so that some of the largest are negative
    drawn["W_dec"] = torch.nn.functional.normalize(drawn["W_dec"], dim=1)
    return {name: tensor.to(torch.float32).to(dtype).requires_grad_() for name, tensor in drawn.items()}


def _x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(5)).to(dtype) + 1


def _rows(dead: list[int], capacity: int) -> DeadRows:
    counter = DeadLatents(N, after_tokens=10)
    counter.tokens_since_fired[dead] = 10
    return counter.rows(capacity)


def _ours(
    form: AuxK, dead: list[int], k_aux: int, capacity: int, dtype: torch.dtype = torch.float64, x: Tensor | None = None
) -> Tensors:
    sae = SAE(SAEConfig(D, N, K), seed=None, dtype=dtype)
    sae.load_state_dict({name: tensor.detach() for name, tensor in _params(dtype).items()})
    x = _x(dtype) if x is None else x
    weights = fvu_weights(x, VARIANCE)
    step = Step(sae, x, x, sae.encode(x), weights, _rows(dead, capacity), k_aux, form)
    loss = step.auxk_loss()
    assert loss is not None
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in sae.named_parameters() if p.grad is not None}}


def _dense(form: AuxK, dead: list[int], k_aux: int, dtype: torch.dtype = torch.float64) -> Tensors:
    params, x = _params(dtype), _x(dtype)
    is_dead = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)
    with torch.no_grad():
        latent_acts = dense_topk(x, params["W_enc_T"], params["b_enc"], K, params["b_dec"])
        residual = x - dense_decode(latent_acts, params)
    loss = AUXK[form](x, params, residual, is_dead, k_aux, target=x, variance=VARIANCE)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in params.items() if p.grad is not None}}


DEAD = [0, 3, 7, 8, 21]


@pytest.mark.parametrize("dead", [[4], DEAD, list(range(N))], ids=["one", "few", "all"])
@pytest.mark.parametrize("k_aux", [1, 3, 12])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_that_of_its_library_whatever_rows_are_left_over(form: AuxK, k_aux: int, dead: list[int]) -> None:
    theirs = _dense(form, dead, k_aux)
    for capacity in {len(dead), max(16, len(dead)), N}:
        ours = _ours(form, dead, k_aux, capacity)
        assert ours.keys() == theirs.keys() == {"loss", "W_enc_T", "W_dec", "b_enc", "b_dec"}
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-14, msg=f"{name}, {capacity} rows")


@pytest.mark.parametrize("form", FORMS)
def test_t1_each_form_is_as_accurate_as_dense_autograd(form: AuxK) -> None:
    exact, theirs = (_dense(form, DEAD, 3, dtype) for dtype in (torch.float64, torch.float32))
    ours = _ours(form, DEAD, 3, 16, torch.float32)
    for name, expected in exact.items():
        assert_as_accurate(ours[name], theirs[name], expected, f"{form} {name}")


def test_the_forms_differ_where_their_formulas_do() -> None:
    few, many = ({form: _ours(form, dead, 8, N)["loss"].item() for form in FORMS} for dead in (DEAD, list(range(N))))
    assert len({round(loss, 9) for loss in few.values()}) == len({round(loss, 9) for loss in many.values()}) == 4
    none_negative = _ours("sae_lens", DEAD, 8, N)["W_dec"]  # all five are taken, some with negative values
    assert not torch.allclose(none_negative, _ours("gao", DEAD, 8, N)["W_dec"], rtol=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_without_dead_latents_every_form_and_its_gradients_are_zero(form: AuxK) -> None:
    ours = _ours(form, [], 3, 16)
    assert all(not bool(tensor.any()) for tensor in ours.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_no_batch_makes_a_denominator_vanish(form: AuxK, tokens: int) -> None:
    ours = _ours(form, DEAD, 3, 8, x=_x()[:1].expand(tokens, D))  # equal tokens: residuals and targets do not vary
    assert all(bool(tensor.isfinite().all()) for tensor in ours.values())
    assert 0 < ours["loss"].item() < 1 / LEAST_RESIDUAL * 1e3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_in_kernels_rows_that_stand_for_no_latent_change_nothing(
    form: AuxK, precision: Any, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    x = torch.randn(B, D, generator=generator) * 10.0 ** torch.linspace(-3, 3, B)[:, None]
    results = []
    for capacity in (4, 16):
        sae = SAE(SAEConfig(D, N, K), seed=2)
        sae.precision = precision
        with torch.no_grad():
            sae.W_enc_T[0] = 100.0  # the latent whose row stands in the rows left over, which lives
            sae.b_enc[DEAD[1:]] = -1.0
        residual = torch.randn(B, D, generator=torch.Generator().manual_seed(7))
        weights = fvu_weights(x, VARIANCE)
        decoded = ops.DecodeLoss((weights * residual.square().sum(1)).sum(), x - residual, residual)
        loss = auxk_loss(sae, x, decoded, weights, _rows(DEAD[1:], capacity), 8, form=form)
        loss.backward()
        gradients = {name: p.grad + 0 for name, p in sae.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    assert results[0]["loss"] > 0
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)


def test_the_form_of_the_settings_is_that_of_the_training_and_gao_is_the_default() -> None:
    x = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
    weights = {}
    for form in (None, *FORMS):
        config = TrainConfig(d_sae=32, k=3, tokens=640, batch_tokens=64, dead_after_tokens=64, auxk=form).resolve(8)
        state = init_state(config, RowShuffle(ArraySource(x), 64, seed=0), torch.device("cpu"))
        state.dead.tokens_since_fired[:9] = 64
        metrics = train_step(state, state.batches.next_batch(), config)
        assert (config.auxk, config.auxk_alpha) == (form or "gao", 1.0 if form == "sae_lens" else 1 / 32)
        total = metrics["fvu"] + config.auxk_alpha * metrics["auxk_loss"]
        torch.testing.assert_close(metrics["loss"], total)
        weights[form] = state.sae.W_dec.detach().clone()
    assert torch.equal(weights[None], weights["gao"])
    assert not any(torch.equal(weights[None], weights[form]) for form in FORMS[1:])
    with pytest.raises(ConfigError, match="auxk: expected one of gao, sae_lens, dictionary_learning, sparsify, got"):
        TrainConfig(auxk="bricken")

from __future__ import annotations

import pytest
import torch

from flashsae import SAE, SAEConfig
from flashsae.nn import auxk_loss, fvu_loss


def test_fvu_loss_does_not_depend_on_scale_or_offset(generator: torch.Generator) -> None:
    x, x_hat = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    expected = (x - x_hat).square().mean() / (x - x.mean(0)).square().mean()
    assert fvu_loss(x, x_hat).item() == pytest.approx(expected.item(), rel=1e-5)
    assert fvu_loss(8 * x + 4, 8 * x_hat + 4).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_constant_batch_gives_no_nan() -> None:
    x_hat = torch.ones(3, 2, requires_grad=True)
    loss = fvu_loss(torch.ones(3, 2), x_hat)
    loss.backward()
    assert loss.item() == 0.0
    assert x_hat.grad is not None
    assert bool(torch.isfinite(x_hat.grad).all())


def test_auxk_is_one_where_nothing_is_explained_and_its_target_is_fixed(generator: torch.Generator) -> None:
    residual = torch.randn(400, 6, generator=generator, requires_grad=True)
    residual_hat = torch.zeros(400, 6, requires_grad=True)
    loss = auxk_loss(residual, residual_hat)
    assert loss.item() == pytest.approx(1.0, abs=0.02)
    loss.backward()
    assert residual.grad is None
    assert residual_hat.grad is not None


def test_auxk_reaches_encoder_and_decoder_of_the_dead_latents_only(generator: torch.Generator) -> None:
    sae = SAE(SAEConfig(10, 30, 4))
    x = torch.randn(64, 10, generator=generator)
    dead = torch.tensor([3, 7, 8, 21])
    code, aux_code = sae.encode_aux(x, torch.zeros(30, dtype=torch.bool).index_fill_(0, dead, True), 2)
    assert torch.equal(code.top_indices, sae.encode(x).top_indices)
    assert set(aux_code.top_indices.flatten().tolist()) <= set(dead.tolist())
    auxk_loss(x - sae(x), sae.decode(aux_code, bias=False)).backward()
    for parameter in (sae.W_enc_T, sae.b_enc, sae.W_dec):
        assert parameter.grad is not None
        touched = parameter.grad.reshape(30, -1).abs().sum(1).nonzero()[:, 0].tolist()
        assert touched == dead.tolist()

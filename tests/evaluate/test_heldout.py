from __future__ import annotations

import pytest
import torch

from flashsae import SAE, SAEConfig, evaluate
from flashsae.data.sources import ArraySource
from flashsae.errors import DataError
from flashsae.evaluate import held_out_batches, latent_geometry


def test_figures_are_those_of_the_whole_set(generator: torch.Generator) -> None:
    sae, x = SAE(SAEConfig(6, 20, 3)), torch.randn(101, 6, generator=generator)
    result = evaluate(sae, x.split(17), batch_tokens=10)
    acts = sae.encode(x).to_dense()
    x_hat = acts @ sae.W_dec + sae.b_dec
    assert result.fvu == pytest.approx(((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert result.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    torch.testing.assert_close(result.latent_density, (acts > 0).double().mean(0))
    assert result.tokens == 101


def test_held_out_batches_are_held_out_and_bounded() -> None:
    source = ArraySource(torch.arange(30_000.0)[:, None], held_out=0.2)
    rows = torch.cat(list(held_out_batches(source, 4000)))[:, 0].long()
    assert torch.equal(rows, source.split_rows("held_out")[:4000])


def test_no_tokens_are_an_error() -> None:
    with pytest.raises(DataError, match="expected at least one token to evaluate on"):
        evaluate(SAE(SAEConfig(2, 4, 1)), [])


def test_geometry_on_rows_that_are_known() -> None:
    sae = SAE(SAEConfig(2, 3, 1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]]))
        sae.W_enc_T.copy_(torch.tensor([[5.0, 0.0], [-1.0, -1.0], [1.0, 0.0]]))
    geometry = latent_geometry(sae)
    half = 0.5**0.5
    torch.testing.assert_close(geometry["decoder_norm"], torch.tensor([2.0, 2**0.5, 3.0]))
    torch.testing.assert_close(geometry["encoder_decoder_cosine"], torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(geometry["nearest_decoder_cosine"], torch.tensor([half, half, 0.0]))

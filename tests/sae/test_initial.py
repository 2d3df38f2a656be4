from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from flashsae import SAE, SAEConfig
from flashsae.sae.initial import rows_from_data
from helpers import sites
from helpers.sites import BridgeSettings, MoreSettings

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def registered() -> None:
    sites.register()


@pytest.mark.parametrize("d_sae", [20, 30, 75])
def test_rows_start_with_the_directions_of_tokens(d_sae: int, generator: torch.Generator) -> None:
    x = 5 + 3 * torch.randn(30, 12, generator=generator)
    sae, random = SAE(SAEConfig(12, d_sae, 5), seed=1), SAE(SAEConfig(12, d_sae, 5), seed=1)
    rows_from_data(sae, x, x)
    points = normalize(x - x.mean(0), dim=1)[torch.arange(d_sae) % 30]
    torch.testing.assert_close(sae.W_dec.detach(), normalize(0.8 * points + 0.2 * random.W_dec, dim=1).detach())
    assert torch.equal(sae.W_enc_T, sae.W_dec)
    assert len(sae.W_dec.unique(dim=0)) == d_sae  # also of latents that share a token
    assert torch.equal(sae.b_dec, random.b_dec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_of_any_dtype_give_rows(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(30, 12, generator=generator).bfloat16()
    sae, other = SAE(SAEConfig(12, 20, 5)), SAE(SAEConfig(12, 20, 5))
    rows_from_data(sae, x.to(dtype), x.to(dtype))
    rows_from_data(other, x.float(), x.float())
    assert torch.equal(sae.W_dec, other.W_dec)


def test_a_latent_of_a_transcoder_reads_a_token_and_writes_its_target(generator: torch.Generator) -> None:
    x, y = (torch.randn(30, width, generator=generator) for width in (12, 6))
    config = SAEConfig(12, 20, arch=BridgeSettings(k=3), d_out=6)
    sae, random = SAE(config), SAE(config)
    rows_from_data(sae, x, y)
    for name, tokens in (("W_enc_T", x), ("W_dec", y)):
        points = normalize(tokens - tokens.mean(0), dim=1)[:20]
        expected = normalize(0.8 * points + 0.2 * getattr(random, name).detach(), dim=1)
        torch.testing.assert_close(getattr(sae, name).detach(), expected)


def test_what_starts_equal_stays_equal_and_what_is_no_row_of_a_latent_stays(generator: torch.Generator) -> None:
    x = torch.randn(30, 12, generator=generator)
    config = SAEConfig(12, 20, arch=MoreSettings(k=3))
    sae, random = SAE(config), SAE(config)
    rows_from_data(sae, x, x)
    assert torch.equal(sae.W_gate_T, sae.W_dec)
    assert torch.equal(sae.W_skip, random.W_skip)


def test_tokens_at_the_mean_leave_rows_as_they_are() -> None:
    x = torch.full((7, 12), 0.1)
    sae, random = SAE(SAEConfig(12, 20, 5)), SAE(SAEConfig(12, 20, 5))
    rows_from_data(sae, x, x)
    assert torch.equal(sae.W_dec, random.W_dec)

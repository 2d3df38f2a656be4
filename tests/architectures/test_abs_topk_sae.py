from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, AbsTopKSettings, SAEConfig, TopKSettings, TrainConfig
from flashsae.metrics import LatentActivity
from flashsae.testing import DenseTrainer, oracle
from helpers.real import activations
from helpers.resumed import same_after_a_kill

K = 4


def tokens(n: int, seed: int = 0) -> Tensor:
    """Return tokens of a few directions, each of either sign."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=torch.Generator().manual_seed(9)), dim=1)
    is_there = torch.rand(n, 24, generator=generator) < 0.12
    return (is_there * torch.randn(n, 24, generator=generator)) @ directions


def train(arch: object, **settings: object) -> SAE:
    return flashsae.fit(
        tokens(20_000), d_sae=24, arch=arch, tokens=256 * 250, batch_tokens=256, lr=3e-3, progress=False, **settings
    )


@pytest.fixture(scope="module")
def trained() -> SAE:
    return train(AbsTopKSettings(K))


def test_the_code_is_that_of_the_oracle_with_signs(device: str) -> None:
    sae, x = SAE(SAEConfig(12, 48, arch=AbsTopKSettings(K))).to(device), tokens(31).to(device)
    expected = oracle("abs_topk")(x, dict(sae.named_parameters()), k=K)
    code = sae.encode(x)
    torch.testing.assert_close(code.to_dense(), expected)
    assert bool((expected < 0).any())
    assert torch.equal(sae.eval().encode(x).to_dense(), code.to_dense())


def test_a_latent_is_active_where_its_value_is_below_zero() -> None:
    sae = SAE(SAEConfig(2, 2, arch=AbsTopKSettings(1)))
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.eye(2))
    activity = LatentActivity(2)
    activity.update(sae.encode(torch.tensor([[-3.0, 1.0], [0.0, 0.0], [1.0, -2.0]])))
    assert activity.latent_density().tolist() == [pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert activity.l0() == pytest.approx(2 / 3)


def test_a_training_explains_directions_of_either_sign(trained: SAE) -> None:
    held_out = tokens(4000, seed=1)
    result = flashsae.evaluate(trained, held_out)
    assert result.fvu < 0.8 * flashsae.evaluate(train(TopKSettings(K)), held_out).fvu
    assert result.fvu < 0.15
    assert result.l0 == K
    assert bool((trained.encode(held_out).acts < 0).any())


def test_a_training_is_that_of_the_dense_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE(SAEConfig(12, 40, arch=AbsTopKSettings(K)), dtype=torch.float64)
    dense = DenseTrainer(dict(sae.named_parameters()), 1e-2, 2.0, "abs_topk", k=K)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2, eps=6.25e-10)
    weights = torch.full((64,), 1 / 128, dtype=torch.float64)
    for seed in range(20):
        x = tokens(64, seed).double()
        loss = sae.decode_loss(sae.encode(x), x, token_weights=weights).loss
        torch.testing.assert_close(loss, dense.step(x), rtol=1e-6, atol=0)
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_grad()
        optimizer.step()
        sae.normalize_decoder()


def test_a_short_training_on_activations_of_a_language_model() -> None:
    x, held_out = activations()
    sae = flashsae.fit(x, arch="abs_topk", k=16, d_sae=512, tokens=128 * 80, batch_tokens=128, lr=2e-3, progress=False)
    result = flashsae.evaluate(sae, held_out)
    assert result.fvu < 0.5
    assert result.l0 == 16


def test_it_is_saved_and_loaded(trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == trained.config
    x = tokens(100, seed=3)
    assert torch.equal(loaded(x), trained(x))


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, config = tokens(3000), TrainConfig(batch_tokens=128, checkpoint_every_steps=10, dead_after_tokens=640)
    same_after_a_kill(tmp_path, monkeypatch, x=x, d_sae=48, k=K, arch="abs_topk", tokens=128 * 35, config=config)

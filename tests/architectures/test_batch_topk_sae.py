from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, BatchTopKSettings, SAEConfig, TopKSettings, TrainConfig
from flashsae.architectures.batch_topk import average_threshold
from helpers.resumed import same_after_a_kill

K = 4


def tokens(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=torch.Generator().manual_seed(9)), dim=1)
    how_many = torch.rand(n, 24, generator=generator) < torch.rand(n, 1, generator=generator) * 0.3  # few or many
    return (how_many * torch.rand(n, 24, generator=generator)) @ directions


def train(arch: object) -> SAE:
    config = TrainConfig(batch_tokens=256, lr=3e-3)
    return flashsae.fit(tokens(20_000), d_sae=48, arch=arch, tokens=256 * 250, config=config, progress=False)


@pytest.fixture(scope="module")
def trained() -> SAE:
    return train(BatchTopKSettings(K))


def test_training_takes_the_largest_of_the_batch_and_inference_what_exceeds_the_threshold() -> None:
    sae, x = SAE(SAEConfig(12, 48, arch=BatchTopKSettings(K))), tokens(31)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    largest = pre_acts.flatten().topk(31 * K).values.min()
    torch.testing.assert_close(sae.train().encode(x).to_dense(), pre_acts.where(pre_acts >= largest, 0.0).relu())
    sae.threshold.fill_(0.3)
    torch.testing.assert_close(sae.eval().encode(x).to_dense(), pre_acts.where(pre_acts > 0.3, 0.0))
    torch.testing.assert_close(sae.encode(x[7:8]).to_dense(), sae.encode(x).to_dense()[7:8])  # whatever the batch


def test_the_threshold_follows_the_smallest_activations_of_late() -> None:
    sae = SAE(SAEConfig(12, 48, arch=BatchTopKSettings(K)))
    expected = 0.0
    for step in range(1, 41):
        with torch.no_grad():
            code = sae.encode(tokens(64, step))
        average_threshold(sae, code)
        expected += (float(code.acts.min()) - expected) / max(1.0, step / 10)
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-5)
    sae.threshold_steps.fill_(10**6)
    before = float(sae.threshold)
    average_threshold(sae, code.replace(torch.zeros_like(code.acts)))
    assert float(sae.threshold) == pytest.approx(before * 0.999, rel=1e-5)


def test_a_training_explains_held_out_tokens_with_k_latents_on_average(trained: SAE) -> None:
    assert not trained.training
    held_out = tokens(4000, seed=1)
    result = flashsae.evaluate(trained, held_out)
    assert result.fvu < flashsae.evaluate(train(TopKSettings(K)), held_out).fvu < 0.2
    assert abs(result.l0 - K) < 0.15 * K
    counts = (trained.encode(tokens(1000, seed=2)).to_dense() > 0).sum(1)
    assert counts.min() < K < counts.max()  # tokens that need few leave theirs to those that need many


def test_it_is_saved_and_loaded_with_its_threshold(trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path / "sae", metadata={"of": "a test"})
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == trained.config
    assert not loaded.training
    x = tokens(100, seed=3)
    assert torch.equal(loaded(x), trained(x))


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, config = tokens(3000), TrainConfig(batch_tokens=128, checkpoint_every_steps=10, dead_after_tokens=1280)
    same_after_a_kill(tmp_path, monkeypatch, x=x, d_sae=48, k=K, arch="batch_topk", tokens=128 * 35, config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_threshold_of_a_loop_of_ones_own_has_any_dtype_and_any_batch(dtype: torch.dtype) -> None:
    sae = SAE(SAEConfig(12, 48, arch=BatchTopKSettings(K)), dtype=dtype)
    with torch.no_grad():
        average_threshold(sae, sae.encode(tokens(0)))
        assert float(sae.threshold_steps) == 0
        code = sae.encode(tokens(64))
        average_threshold(sae, code)
    assert float(sae.threshold) == pytest.approx(float(code.acts.min()), rel=1e-2)

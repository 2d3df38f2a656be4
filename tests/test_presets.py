from __future__ import annotations

import pytest

import flashsae
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError
from flashsae.presets import gemma_scope_2


def test_the_recipe_of_gemma_scope_2_is_that_of_its_report() -> None:
    config = gemma_scope_2(50, tokens=4096 * 200_000, d_sae=16384)
    assert (config.lr, config.betas, config.eps, config.batch_tokens) == (7e-5, (0.0, 0.999), 1e-8, 4096)
    assert (config.warmup, config.warmup_start, config.warmup_steps, config.decay_fraction) == (
        "cosine",
        0.1,
        1000,
        0.0,
    )
    assert (config.arch.bandwidth, config.arch.initial_threshold) == (1e-3, 1e-3)
    assert (config.arch.target_l0, config.arch.penalty, config.arch.penalty_weight) == (50, "quadratic", 1.0)
    assert config.arch.sparsity_warmup * config.steps == pytest.approx(50_000)
    assert config.normalize_activations == "mean_square"
    assert gemma_scope_2(50, tokens=10**6).arch.sparsity_warmup == 0.5
    assert gemma_scope_2(50, tokens=10**6, bandwidth=0.01, lr=1e-3).lr == 1e-3
    with pytest.raises(ConfigError, match="bandwith: jump_relu has no such setting"):
        gemma_scope_2(50, tokens=10**6, bandwith=0.01)


def test_it_reaches_the_target_from_half_of_the_latents_however_short() -> None:
    x = SuperpositionModel(12, 24, active=3.0).sample(2000, seed=0) * 30
    config = gemma_scope_2(4.0, tokens=256 * 240, d_sae=48, batch_tokens=256, sparsity_warmup=0.1, log_every_steps=1)
    sae = flashsae.fit(x, config=config, progress=False)
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(4.0, rel=0.1)

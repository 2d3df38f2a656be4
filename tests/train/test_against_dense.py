"""T4: a training on activations of a language model, beside the dense SAE that everybody writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashsae
from flashsae import TrainConfig
from flashsae.architecture import settings_of
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import RowShuffle
from flashsae.evaluate import held_out_batches
from flashsae.metrics import FVU
from flashsae.optim import lr_factor
from flashsae.settings.reading import ReadingConfig
from flashsae.testing import DenseTrainer, dense_decode
from flashsae.text.open import open_text
from flashsae.train import init_state, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    directory = tmp_path_factory.mktemp("cache") / "acts"
    config = ReadingConfig("minilm", hookpoint="encoder.layer.1", context_length=128, shuffle_documents=False)
    write_cache(directory, LanguageModelSource(config, open_text("python-docs"), device="cpu"), max_tokens=20_000)
    return ActivationCache(directory, held_out=0.1)


ARCHS: dict[str, dict[str, Any]] = {
    "topk": {"k": 16},
    "matryoshka:topk": {"k": 16, "prefixes": (0.1, 0.4, 1.0)},
    "hierarchical_topk": {"k": 16, "budgets": (1, 4, 16)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean_square", "layer_norm"])
def test_activations_of_a_language_model_are_learnt_however_they_are_scaled(kind: Any, cache: ActivationCache) -> None:
    settings = TrainConfig(d_sae=1024, k=16, tokens=256 * 100, batch_tokens=256, normalize_activations=kind)
    state = init_state(settings.resolve(cache.d_in), RowShuffle(cache, 256, seed=0), torch.device("cpu"))
    start = flashsae.evaluate(state.current_sae(), held_out_batches(cache, 10_000))
    found = flashsae.evaluate(train(state, settings.resolve(cache.d_in)), held_out_batches(cache, 10_000))
    assert found.fvu < 0.35 < 0.5 < start.fvu
    assert 15.9 < found.l0 <= 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_held_out_fvu_is_within_half_a_percent_of_a_dense_reference(name: str, cache: ActivationCache) -> None:
    arch, steps = settings_of(name, **ARCHS[name]), 250 if name == "topk" else 80
    settings = TrainConfig(d_sae=1024, arch=arch, tokens=256 * steps, batch_tokens=256, auxk_alpha=0.0)
    config = settings.resolve(cache.d_in)
    state = init_state(config, RowShuffle(cache, 256, seed=0), torch.device("cpu"))
    params = dict(state.sae.named_parameters())
    dense = DenseTrainer(params, config.lr, state.variance, name, **ARCHS[name])
    batches = RowShuffle(cache, 256, seed=0)
    for step in range(config.steps):
        x = only_site(batches.next_batch()).float() * state.scale
        dense.step(x, config.lr * lr_factor(step, config.steps, config.warmup_steps, steps // 5))
    sae = train(state, config)

    held_out = torch.cat(list(map(only_site, held_out_batches(cache, 10_000)))).float()
    assert len(held_out) > 500
    reference = FVU()
    with torch.no_grad():
        scaled = held_out * state.scale
        reference.update(scaled, dense_decode(dense.encode(scaled), dense.params))
    ours = flashsae.evaluate(sae, held_out).fvu
    assert 0.05 < reference.compute() < (0.5 if name == "topk" else 0.8)  # it has learnt something, and not everything
    assert ours == pytest.approx(reference.compute(), rel=0.005)
    with torch.no_grad():
        assert float((sae.encode(held_out).acts != 0).sum()) / len(held_out) == pytest.approx(16, rel=0.02)
    print(f"held-out FVU {ours:.5f}, dense reference {reference.compute():.5f}")

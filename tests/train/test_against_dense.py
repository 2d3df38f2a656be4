"""T4: a training on activations of a language model, beside the dense SAE that everybody writes."""

from __future__ import annotations

import pytest
import torch

import flashsae
from flashsae import TrainConfig
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import RowShuffle
from flashsae.data.text import open_text
from flashsae.evaluate import held_out_batches
from flashsae.metrics import FVU
from flashsae.optim import lr_factor
from flashsae.settings.reading import ReadingConfig
from flashsae.testing import DenseTrainer, dense_decode
from flashsae.train import init_state, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    directory = tmp_path_factory.mktemp("cache") / "acts"
    config = ReadingConfig("minilm", hookpoint="encoder.layer.1", context_length=128, shuffle_documents=False)
    write_cache(directory, LanguageModelSource(config, open_text("python-docs"), device="cpu"), max_tokens=20_000)
    return ActivationCache(directory, held_out=0.1)


@pytest.mark.slow
def test_held_out_fvu_is_within_half_a_percent_of_a_dense_reference(cache: ActivationCache) -> None:
    settings = TrainConfig(d_sae=1024, k=16, tokens=256 * 250, batch_tokens=256, auxk_alpha=0.0)
    config = settings.resolve(cache.d_in)
    state = init_state(config, RowShuffle(cache, 256, seed=0), torch.device("cpu"))
    dense = DenseTrainer(dict(state.sae.named_parameters()), config.lr, state.variance, k=config.arch.k)
    batches = RowShuffle(cache, 256, seed=0)
    for step in range(config.steps):
        x = only_site(batches.next_batch()).float() * state.scale
        dense.step(x, config.lr * lr_factor(step, config.steps, config.warmup_steps, 50))
    sae = train(state, config)

    held_out = torch.cat(list(map(only_site, held_out_batches(cache, 10_000)))).float()
    assert len(held_out) > 500
    reference = FVU()
    with torch.no_grad():
        scaled = held_out * state.scale
        reference.update(scaled, dense_decode(dense.encode(scaled), dense.params))
    ours = flashsae.evaluate(sae, held_out).fvu
    assert 0.05 < reference.compute() < 0.5  # it has learnt something, and not everything
    assert ours == pytest.approx(reference.compute(), rel=0.005)
    print(f"held-out FVU {ours:.5f}, dense reference {reference.compute():.5f}")

"""SAEBench takes an SAE of ours as it takes its own: its loader, its core evaluation, and what collects codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

import flashsae
from flashsae.architecture import settings_of

D, F, K, HOOK = 16, 48, 4, "blocks.1.hook_resid_post"


class Tokenizer:
    """What is asked of a tokenizer where texts are tokens already."""

    bos_token_id, eos_token_id, pad_token_id, sep_token_id = 0, 1, 2, None
    name_or_path, padding_side = "none", "right"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", device="cpu", seed=0,
        default_prepend_bos=False,
    )  # fmt: skip
    model = HookedTransformer(config)
    model.tokenizer = Tokenizer()
    return model


def sae_of(arch: str, generator: torch.Generator, *, unit: bool = True) -> flashsae.SAE:
    own = {"k": K} if arch in ("topk", "batch_topk") else {}
    sae = flashsae.SAE(flashsae.SAEConfig(D, F, arch=settings_of(arch, **own))).eval()
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1, generator=generator)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.5)
        if not unit:
            sae.W_dec.mul_(0.5 + torch.rand(F, 1, generator=generator))
    return sae


def formatted(sae: flashsae.SAE) -> Any:
    bench = flashsae.saebench(sae, model_name="tiny", hook_name=HOOK, context_size=16)
    name, loaded, sparsity = general_utils.load_and_format_sae("mine", bench, "cpu")
    assert (name, sparsity) == ("custom_sae", None)
    assert general_utils.check_decoder_norms(loaded.W_dec.data)
    return loaded.to(device="cpu", dtype=torch.float32)


def evaluated(sae: Any, model: HookedTransformer) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = torch.randint(3, 50, (64, 16), generator=torch.Generator().manual_seed(1))
    store = ActivationsStore.from_sae(
        model, sae, Dataset.from_dict({"tokens": tokens.tolist()}), context_size=16, streaming=False,
        store_batch_size_prompts=4, train_batch_size_tokens=64, n_batches_in_buffer=2,
    )  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    return core.run_evals(sae, store, model, config, ignore_tokens={0, 1, 2})


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jump_relu", "relu", "gated"])
def test_the_core_evaluation_runs(arch: str, unit: bool, model: Any, generator: torch.Generator) -> None:
    metrics, features = evaluated(formatted(sae_of(arch, generator, unit=unit)), model)
    assert metrics["sparsity"]["l0"] > 0
    assert metrics["reconstruction_quality"]["mse"] >= 0
    assert len(features["feature_density"]) == F
    assert core.calculate_misc_metrics(features)["frac_alive"] > 0


def test_its_own_sae_of_the_same_weights_is_told_the_same(model: Any, generator: torch.Generator) -> None:
    sae = sae_of("topk", generator)
    theirs = TopKSAE(D, F, K, "tiny", 1, torch.device("cpu"), torch.float32, hook_name=HOOK)
    with torch.no_grad():
        theirs.W_enc.copy_(sae.W_enc_T.T)
        for name in ("W_dec", "b_enc", "b_dec"):
            getattr(theirs, name).copy_(getattr(sae, name))
    _, theirs, _ = general_utils.load_and_format_sae("theirs", theirs, "cpu")
    (ours, of_latents), (expected, of_their_latents) = (evaluated(each, model) for each in (formatted(sae), theirs))
    for group, values in expected.items():
        for name, value in values.items():
            assert ours[group][name] == pytest.approx(value, rel=1e-3, abs=1e-5), f"{group} {name}"
    for name, values in of_their_latents.items():
        assert torch.allclose(torch.tensor(of_latents[name]), torch.tensor(values), atol=1e-4, equal_nan=True), name


def test_codes_are_collected_and_results_written(model: Any, tmp_path: Path, generator: torch.Generator) -> None:
    loaded = formatted(sae_of("jump_relu", generator))
    tokens = torch.randint(3, 50, (6, 16), generator=generator)
    codes = activation_collection.collect_sae_activations(
        tokens, model, loaded, 4, 1, HOOK, mask_bos_pad_eos_tokens=True, selected_latents=[1, 5]
    )
    assert codes.shape == (6, 16, 2)
    density = activation_collection.get_feature_activation_sparsity(tokens, model, loaded, 4, 1, HOOK)
    assert density.shape == (F,)
    (tmp_path / "cfg.json").write_text(json.dumps(loaded.cfg.to_dict()))

"""SAELens puts what we write into models, and evaluates it there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformerConfig

from flashsae.sae.saved import sae_of
from helpers.contents import random_content
from helpers.pages import ROOT

F, K = 37, 5


def a_model() -> Any:
    """Return a language model of two layers at random, of transformer-lens, into which SAELens puts SAEs."""
    config = HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_vocab=31, act_fn="gelu", model_name="gpt2", seed=0,
        device="cpu",
    )  # fmt: skip
    return sae_lens.HookedSAETransformer(config)


@torch.no_grad()
@pytest.mark.parametrize("hookpoint", ["h.1", "h.1:in", "h.1.mlp", "h.1.attn", "h.1.ln_2:in", "h.1.attn.c_proj:in"])
def test_saelens_puts_ours_where_its_hookpoint_says(hookpoint: str, tmp_path: Path) -> None:
    ours = sae_of(random_content("relu", 8, F))
    ours.save(tmp_path / "sae", format="saelens", metadata={"model": "gpt2", "hookpoint": hookpoint})
    theirs, model, ids = sae_lens.SAE.load_from_disk(tmp_path / "sae"), a_model(), torch.arange(24).view(2, 12)
    hook = theirs.cfg.metadata.hook_name
    _, plain = model.run_with_cache(ids)
    _, cache = model.run_with_cache_with_saes(ids, saes=[theirs])
    x = plain[hook].reshape(2, 12, 8)  # heads beside each other, where it has them
    torch.testing.assert_close(ours.encode(x).to_dense(), cache[f"{hook}.hook_sae_acts_post"])
    torch.testing.assert_close(ours(x), cache[f"{hook}.hook_sae_recons"])


def test_saelens_puts_our_transcoder_around_an_mlp(tmp_path: Path) -> None:
    content = random_content("transcoder:relu", 8, F, metadata={"model": "gpt2", "hookpoint": "h.1.mlp:in, h.1.mlp"})
    ours = sae_of(content)
    ours.save(tmp_path / "sae", format="saelens", metadata=content.metadata)
    theirs, model, ids = sae_lens.SAE.load_from_disk(tmp_path / "sae"), a_model(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain = model.run_with_cache(ids)[1]["blocks.1.mlp.hook_in"]
        logits = model.run_with_saes(ids, saes=[theirs])
        changed = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_out", lambda *_, **__: ours(plain))])
    torch.testing.assert_close(logits, changed)


def test_the_evaluations_of_saelens_find_what_they_ask_for(tmp_path: Path) -> None:
    ours = sae_of(random_content("topk", 8, F, k=K))
    metadata = {"model": "gpt2", "hookpoint": "h.1", "context_length": 16, "prepend_bos": False, "dataset": "mine"}
    ours.save(tmp_path / "sae", format="saelens", metadata=metadata)
    theirs, model = sae_lens.SAE.load_from_disk(tmp_path / "sae"), a_model()
    rows = torch.randint(0, 31, (64, 16), generator=torch.Generator().manual_seed(0))
    store = sae_lens.ActivationsStore.from_sae(
        model, theirs, Dataset.from_dict({"tokens": rows.tolist()}), streaming=False, store_batch_size_prompts=4,
        n_batches_in_buffer=4, train_batch_size_tokens=16,
    )  # fmt: skip
    assert (store.hook_name, store.context_size, store.prepend_bos) == ("blocks.1.hook_resid_post", 16, False)
    config = EvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, compute_ce_loss=True, compute_kl=True,
        n_eval_sparsity_variance_batches=2, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )  # fmt: skip
    metrics, _ = run_evals(theirs, store, model, ActivationScaler(), config, exclude_special_tokens=False)
    assert metrics["sparsity"]["l0"] == pytest.approx(K, abs=1)


def test_the_page_says_how_ours_is_loaded_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "interop.md").read_text("utf-8").split("\n## SAELens\n")[1].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["theirs"].cfg.metadata.hook_name == "blocks.6.hook_resid_post"
    assert names["again"].config == names["sae"].config
    assert torch.equal(names["again"].W_dec, names["sae"].W_dec)
    assert (names["codes"] > 0).sum(1).max() <= 8

"""SAEBench's readers of dictionary_learning's files take what is written for them, norms of decoder rows included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.custom_saes import batch_topk_sae, gated_sae, jumprelu_sae, relu_sae, topk_sae

from flashsae.formats import dictionary_learning
from helpers.dense_content import codes, made, reconstructed

READERS = {
    "TopKTrainer": topk_sae.load_dictionary_learning_topk_sae,
    "BatchTopKTrainer": batch_topk_sae.load_dictionary_learning_batch_topk_sae,
    "MatryoshkaBatchTopKTrainer": batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae,
    "JumpReluTrainer": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
    "StandardTrainer": relu_sae.load_dictionary_learning_relu_sae,
    "GatedSAETrainer": gated_sae.load_dictionary_learning_gated_sae,
}
"""As its run_all_evals_dictionary_learning_saes chooses them, which imports all that its evaluations need."""
PLACE = {"model": "EleutherAI/pythia-70m-deduped", "hookpoint": "layers.3", "context_length": 64}
SAES: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("hierarchical_topk", {}),
    ("batch_topk", {}),
    ("matryoshka", {"k": 5, "prefixes": [1, 9, 37]}),
    ("jump_relu", {"unit_rows": False}),
    ("relu", {"unit_rows": False}),
    ("gated", {"unit_rows": False}),
]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what loads the SAE in `tmp_path` as SAEBench loads one of a repository."""
    for module in (batch_topk_sae, gated_sae, jumprelu_sae, relu_sae, topk_sae):
        monkeypatch.setattr(module, "hf_hub_download", lambda filename, **_: str(tmp_path / filename))

    def call() -> Any:
        config = json.loads((tmp_path / "config.json").read_text())
        read = READERS[config["trainer"]["trainer_class"]]
        return read("owner/name", "ae.pt", "pythia-70m-deduped", torch.device("cpu"), torch.float32, layer=3)

    return call


@pytest.mark.parametrize(("architecture", "settings"), SAES, ids=[name for name, _ in SAES])
@pytest.mark.parametrize("subtracts", [True, False])
def test_saebench_reads_what_is_written(
    architecture: str, settings: dict[str, Any], subtracts: bool, tmp_path: Path, load: Any
) -> None:
    content = made(architecture, apply_b_dec_to_input=subtracts, metadata=PLACE, **settings)
    assert dictionary_learning.write(tmp_path, content, False) == []
    sae, x = load(), torch.randn(60, 7)
    assert sae.cfg.hook_name == "blocks.3.hook_resid_post"
    with torch.no_grad():
        told = codes(dictionary_learning.read(tmp_path), x)
        torch.testing.assert_close(sae.encode(x).double(), told, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sae(x).double(), reconstructed(content, x), rtol=1e-5, atol=1e-4)


def test_saebench_refuses_what_is_written_with_other_norms(tmp_path: Path, load: Any) -> None:
    dictionary_learning.write(tmp_path, made("topk", unit_rows=False, metadata=PLACE), False)
    with pytest.raises(ValueError, match="not normalized"):
        load()

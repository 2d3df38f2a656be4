"""dictionary_learning loads what is written for it and gives the same numbers; what it saves is loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import sae_lens.loading.pretrained_sae_loaders as sae_lens_loaders
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from torch import Tensor, nn

import flashsae

D, F, K = 7, 37, 5
BIASES = ("b_dec", "bias", "decoder.bias", "decoder_bias", "encoder.bias", "b_enc", "gate_bias", "mag_bias")
KINDS = {
    "AutoEncoderTopK": AutoEncoderTopK,
    "BatchTopKSAE": BatchTopKSAE,
    "MatryoshkaBatchTopKSAE": lambda d, n, k: MatryoshkaBatchTopKSAE(d, n, k, [1, n - 1]),
    "JumpReluAutoEncoder": lambda d, n, k: JumpReluAutoEncoder(d, n),
    "AutoEncoder": lambda d, n, k: AutoEncoder(d, n),
    "AutoEncoderNew": lambda d, n, k: AutoEncoderNew(d, n),
    "GatedAutoEncoder": lambda d, n, k: GatedAutoEncoder(d, n),
}


def tokens(d_in: int) -> Tensor:
    """Return tokens of any size, some of them zero, and some twice."""
    x = torch.randn(60, d_in, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 60)[:, None]
    return torch.cat([x, torch.zeros(2, d_in), x[:1], torch.ones(1, d_in)])


def assert_same(theirs: Any, sae: flashsae.SAE) -> None:
    """Check that both do the same to tokens."""
    x = tokens(sae.config.d_in)
    with torch.no_grad():
        for told, expected in ((sae.encode(x).to_dense(), theirs.encode(x)), (sae(x), theirs(x))):
            torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def shaken(module: nn.Module) -> nn.Module:
    """Give a dictionary biases, and a threshold that is positive; decoder rows of norm 1 keep it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in (
                "b_dec",
                "bias",
                "decoder.bias",
                "decoder_bias",
                "encoder.bias",
                "b_enc",
                "gate_bias",
                "mag_bias",
            ):
                value.normal_(generator=generator)
            elif name == "r_mag":
                value.normal_(std=0.3, generator=generator)
            elif name == "threshold":
                value.copy_(torch.rand(value.shape, generator=generator))
    return module


def saved(folder: Path, module: nn.Module, kind: str, k: int) -> Path:
    """Write what a training of theirs does."""
    folder.mkdir(parents=True)
    torch.save(module.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "k": k}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(D, F, K), (D, F, 1), (D, F, F), (16, 64, 8)])
def test_what_they_save_gives_the_same_numbers_here(kind: str, d_in: int, d_sae: int, k: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "trainer_0", shaken(KINDS[kind](d_in, d_sae, k)), kind, k)
    theirs, _ = load_dictionary(str(folder), "cpu")
    sae = flashsae.load(folder)
    assert_same(theirs, sae)
    sae.save(tmp_path / "again", format="dictionary_learning")
    again, config = load_dictionary(str(tmp_path / "again"), "cpu")
    if kind == "AutoEncoderNew":  # is written as an AutoEncoder, with rows of norm 1
        torch.testing.assert_close(again(tokens(d_in)), theirs(tokens(d_in)), rtol=1e-5, atol=1e-3)
    else:
        assert config["trainer"]["dict_class"] == kind
        assert_same(again, sae)
        expected = theirs.state_dict()
        told = {name: value for name, value in again.state_dict().items() if kind == "BatchTopKSAE" or value.dim()}
        assert kind == "AutoEncoder" or all(torch.equal(value, expected[name]) for name, value in told.items())


def test_a_threshold_that_is_not_set_is_that_of_a_relu(tmp_path: Path) -> None:
    folder = saved(tmp_path / "trainer_0", BatchTopKSAE(D, F, K), "BatchTopKSAE", K)
    assert_same(load_dictionary(str(folder), "cpu")[0], flashsae.load(folder))


OURS: list[tuple[str, dict[str, Any], str]] = [
    ("topk", {"k": K}, "AutoEncoderTopK"),
    ("topk", {"k": F}, "AutoEncoderTopK"),
    ("hierarchical_topk", {"k": K}, "AutoEncoderTopK"),
    ("matryoshka:topk", {"k": K, "prefixes": (0.5, 1.0)}, "AutoEncoderTopK"),
    ("batch_topk", {"k": K}, "BatchTopKSAE"),
    ("matryoshka", {"k": K, "prefixes": (1, 9, F)}, "MatryoshkaBatchTopKSAE"),
    ("jump_relu", {"target_l0": 5.0}, "JumpReluAutoEncoder"),
    ("relu", {}, "AutoEncoder"),
    ("gated", {}, "GatedAutoEncoder"),
]


def random_sae(
    architecture: str, settings: dict[str, Any], *, subtracts: bool = True, unit_rows: bool = True
) -> flashsae.SAE:
    arch = flashsae.architecture.settings_of(architecture, **settings)
    sae = flashsae.SAE(flashsae.SAEConfig(D, F, arch=arch, apply_b_dec_to_input=subtracts)).eval()
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            generator = torch.Generator().manual_seed(value.numel())
            if value.dim():
                value.normal_(generator=generator)
            if name in ("threshold", "r_mag"):
                value.copy_(torch.rand(value.shape, generator=generator))
        if unit_rows:
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.mark.parametrize(("architecture", "settings", "kind"), OURS, ids=str)
@pytest.mark.parametrize("subtracts", [True, False])
def test_they_give_the_same_numbers_as_what_is_written(
    architecture: str, settings: dict[str, Any], kind: str, subtracts: bool, tmp_path: Path
) -> None:
    sae = random_sae(architecture, settings, subtracts=subtracts)
    sae.save(tmp_path / "sae", format="dictionary_learning", metadata={"model": "gpt2", "hookpoint": "h.3"})
    theirs, config = load_dictionary(str(tmp_path / "sae"), "cpu")
    assert type(theirs).__name__ == kind == config["trainer"]["dict_class"]
    assert_same(theirs, sae)
    assert_same(theirs, flashsae.load(tmp_path / "sae"))


@pytest.mark.parametrize("architecture", ["relu", "jump_relu", "gated"])
def test_norms_of_rows_go_into_their_activations(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture, {}, unit_rows=False)
    sae.save(tmp_path / "sae", format="dictionary_learning")
    theirs, _ = load_dictionary(str(tmp_path / "sae"), "cpu")
    x = tokens(D)
    with torch.no_grad():
        expected = sae.encode(x).to_dense() * sae.W_dec.norm(dim=1)
        torch.testing.assert_close(theirs.encode(x), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
        torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5 * float(sae(x).abs().max()))


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_norms_of_rows_that_are_compared_are_kept(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture, {"k": K}, unit_rows=False)
    sae.save(tmp_path / "sae", format="dictionary_learning")
    theirs, _ = load_dictionary(str(tmp_path / "sae"), "cpu")
    assert_same(theirs, sae)


@pytest.mark.parametrize(("architecture", "settings", "kind"), OURS, ids=str)
def test_sae_lens_reads_these_files_too(
    architecture: str, settings: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {"model": "gpt2", "hookpoint": "h.3", "context_length": 64}
    sae = random_sae(architecture, settings)
    sae.save(tmp_path / "sae", format="dictionary_learning", metadata=metadata)
    monkeypatch.setattr(
        sae_lens_loaders, "hf_hub_download", lambda repo_id, filename, force_download=False: str(tmp_path / filename)
    )
    config, state, _ = sae_lens_loaders.dictionary_learning_sae_huggingface_loader_1("owner/name", "sae", "cpu")
    assert config["hook_name"] == "blocks.3.hook_resid_post"
    theirs = sae_lens.SAE.from_dict(sae_lens_loaders.handle_config_defaulting(config))
    theirs.load_state_dict({name: value.contiguous() for name, value in state.items()})
    assert_same(theirs, sae)

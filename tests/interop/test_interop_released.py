"""SAEs in the layouts of releases: what SAELens's own loaders make of the files is what is read here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import safe_open
from safetensors.torch import save_file

import flashsae
from helpers.released import D, F, jump_relu_weights, normal

X = normal(33, D)
D_OUT = 5


@pytest.fixture(autouse=True)
def _the_hub_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SAELens find files of a repository in the folder of its name."""

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(tmp_path / repo_id / subfolder / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(tmp_path / repo_id / filename, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)


def theirs_of(loader: Callable[..., Any], repository: str, folder: str, **changes: Any) -> SAE[Any]:
    """Return what SAELens makes of it; `changes` are of what it knows by heart, such as the width of the model."""
    return SAE.from_pretrained(repository, folder, converter=partial(_with, loader, changes))


def _with(loader: Callable[..., Any], changes: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return loader(*args, **{**kwargs, "cfg_overrides": {**(kwargs.get("cfg_overrides") or {}), **changes}})


def assert_same(ours: flashsae.SAE, theirs: SAE[Any]) -> None:
    codes = theirs.encode(X)
    assert 0 < (codes > 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(X).to_dense(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", ["res", "mlp", "att", "transcoders"])
def test_gemma_scope(tmp_path: Path, site: str) -> None:
    repository, folder = f"google/gemma-scope-2b-pt-{site}", "layer_20/width_16k/average_l0_71"
    (tmp_path / repository / folder).mkdir(parents=True)
    weights = {name: weight.numpy() for name, weight in jump_relu_weights().items()}
    np.savez(tmp_path / repository / folder / "params.npz", **weights)
    sizes = {"d_in": D, "d_sae": F, "reshape_activations": "none", **({"d_out": D} if site == "transcoders" else {})}
    loader = (
        loaders.gemma_2_transcoder_huggingface_loader
        if site == "transcoders"
        else loaders.gemma_2_sae_huggingface_loader
    )
    assert_same(flashsae.load(tmp_path / repository / folder), theirs_of(loader, repository, folder, **sizes))


def test_an_embedding_of_gemma_scope_is_of_rows_that_the_model_has_not_scaled(tmp_path: Path) -> None:
    repository, folder = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    (tmp_path / repository / folder).mkdir(parents=True)
    weights = {name: weight.numpy() for name, weight in jump_relu_weights().items()}
    np.savez(tmp_path / repository / folder / "params.npz", **weights)
    theirs = theirs_of(loaders.gemma_2_sae_huggingface_loader, repository, folder, d_in=D, d_sae=F)
    ours = flashsae.load(tmp_path / repository / folder)
    scaled = X * D**0.5  # what transformer-lens calls the embedding
    torch.testing.assert_close(ours.encode(X).to_dense(), theirs.encode(scaled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["config", "no config"])
@pytest.mark.parametrize(
    ("site", "affine"),
    [("resid_post", 0), ("attn_out_all", 0), ("mlp_out", 0), ("transcoder_all", 0), ("transcoder", 1)],
)
def test_gemma_scope_2(tmp_path: Path, site: str, affine: int, config: str) -> None:
    is_transcoder = site.startswith("transcoder")
    repository, folder = "google/gemma-scope-2-270m-pt", f"{site}/layer_3_width_16k_l0_big{'_affine' * affine}"
    path = tmp_path / repository / folder
    path.mkdir(parents=True)
    d_out = D_OUT if is_transcoder else D
    weights = {name.replace("W", "w"): weight for name, weight in jump_relu_weights(D, d_out).items()}
    if affine:
        weights["affine_skip_connection"] = normal(D, d_out, seed=9)
    save_file(weights, path / "params.safetensors")
    told = loaders._infer_gemma_3_raw_cfg_dict(repository, folder)
    (path / "config.json").write_text(json.dumps(told), "utf-8")
    theirs = theirs_of(loaders.gemma_3_sae_huggingface_loader, repository, folder, reshape_activations="none")
    if config == "no config":
        (path / "config.json").unlink()
    ours = flashsae.load(path)
    assert_same(ours, theirs)
    assert ours.config.architecture.name == f"{'skip_' * affine}{'transcoder:' * is_transcoder}jump_relu"


@pytest.mark.parametrize("k", [4, 30])
def test_qwen_scope(tmp_path: Path, k: int) -> None:
    repository = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{k}"
    (tmp_path / repository).mkdir(parents=True)
    weights = {"W_enc": normal(F, D), "W_dec": normal(D, F), "b_enc": normal(F), "b_dec": normal(D, seed=1)}
    torch.save(weights, tmp_path / repository / "layer7.sae.pt")
    theirs = theirs_of(loaders.qwen_scope_sae_huggingface_loader, repository, "layer7.sae.pt", d_in=D, d_sae=F, k=k)
    assert_same(flashsae.load(tmp_path / repository), theirs)


def test_llama_scope(tmp_path: Path) -> None:
    repository, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    path = tmp_path / repository / folder
    (path / "checkpoints").mkdir(parents=True)
    weights = {
        "encoder.weight": normal(F, D), "encoder.bias": normal(F), "decoder.weight": normal(D, F),
        "decoder.bias": normal(D, seed=1),
    }  # fmt: skip
    save_file(weights, path / "checkpoints" / "final.safetensors")
    config = {
        "d_model": D, "d_sae": F, "hook_point_in": "blocks.15.hook_resid_post", "act_fn": "jumprelu",
        "hook_point_out": "blocks.15.hook_resid_post", "norm_activation": "dataset-wise", "top_k": 50,
        "jump_relu_threshold": 0.35546875, "dataset_average_activation_norm": {"in": 1.3125, "out": 1.3125},
        "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
    }  # fmt: skip
    (path / "hyperparams.json").write_text(json.dumps(config), "utf-8")
    theirs = theirs_of(loaders.llama_scope_sae_huggingface_loader, repository, folder, dtype="float32")
    theirs.fold_activation_norm_scaling_factor(D**0.5 / 1.3125)  # as it does with the factors in its list of releases
    assert_same(flashsae.load(path), theirs)


def test_goodfire(tmp_path: Path) -> None:
    repository, name = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    (tmp_path / repository).mkdir(parents=True)
    weights = {
        "encoder_linear.weight": normal(F, D), "encoder_linear.bias": normal(F), "decoder_linear.weight": normal(D, F),
        "decoder_linear.bias": normal(D, seed=1),
    }  # fmt: skip
    torch.save(weights, tmp_path / repository / name)
    theirs = theirs_of(loaders.get_goodfire_huggingface_loader, repository, name, d_in=D, d_sae=F, dtype="float32")
    assert_same(flashsae.load(tmp_path / repository / name), theirs)

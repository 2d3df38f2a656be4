"""What docs/interop.md loads from the hub can be loaded: from a stand-in that has tiny files in the same places."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import flashsae
from flashsae.places.finding import find
from helpers import hub as stand_in
from helpers.hub import Hub
from helpers.pages import ROOT, code_blocks
from helpers.released import D, F, jump_relu_weights, normal

PAGE = ROOT / "docs" / "interop.md"
PLACES = re.findall(r'"hf://([\w.-]+/[\w.-]+)/?([^"]*)"', "\n".join(code_blocks(PAGE)))
RELEASES = r"google/gemma-scope|Goodfire/|fnlp/|Qwen/"


def pickled(tensors: dict[str, Tensor]) -> bytes:
    whole = io.BytesIO()
    torch.save(tensors, whole)
    return whole.getvalue()


def gemma_scope(path: str) -> dict[str, bytes]:
    whole = io.BytesIO()
    np.savez(whole, **{name: weight.numpy() for name, weight in jump_relu_weights().items()})
    return {f"{path}/params.npz": whole.getvalue()}


def gemma_scope_2(path: str) -> dict[str, bytes]:
    tensors = {name.replace("W", "w"): weight for name, weight in jump_relu_weights().items()}
    tensors |= {"affine_skip_connection": normal(D, D, seed=9)} if path.endswith("affine") else {}
    config = {"architecture": "jump_relu", "model_name": "gemma-3-270m-pt", "l0": 20}
    return {
        f"{path}/params.safetensors": safetensors.torch.save(tensors),
        f"{path}/config.json": json.dumps(config).encode(),
    }


def goodfire(path: str) -> dict[str, bytes]:
    sides = {"encoder_linear": (F, D), "decoder_linear": (D, F)}
    weights = {f"{name}.weight": normal(*shape) for name, shape in sides.items()}
    return {
        "Llama-3.1-8B-Instruct-SAE-l19.pth": pickled(weights | {f"{n}.bias": normal(s[0]) for n, s in sides.items()})
    }


def llama_scope(path: str) -> dict[str, bytes]:
    sides = {"encoder": (F, D), "decoder": (D, F)}
    weights = {f"{name}.weight": normal(*shape) for name, shape in sides.items()}
    weights |= {f"{name}.bias": normal(shape[0]) for name, shape in sides.items()}
    told = {"d_model": D, "d_sae": F, "hook_point_in": "blocks.15.hook_resid_post", "jump_relu_threshold": 0.5}
    told |= {"dataset_average_activation_norm": {"in": 2.0, "out": 2.0}}
    return {
        f"{path}/checkpoints/final.safetensors": safetensors.torch.save(weights),
        f"{path}/hyperparams.json": json.dumps(told).encode(),
        f"{path}/lm_config.json": json.dumps({"model_name": "meta-llama/Llama-3.1-8B"}).encode(),
    }


def qwen_scope(path: str) -> dict[str, bytes]:
    weights = {"W_enc": normal(60, D), "W_dec": normal(D, 60), "b_enc": normal(60), "b_dec": normal(D)}
    return {f"layer{layer}.sae.pt": pickled(weights) for layer in range(16)}


FILES = {
    "google/gemma-scope-2b": gemma_scope, "google/gemma-scope-2-": gemma_scope_2, "Goodfire/": goodfire,
    "fnlp/": llama_scope, "Qwen/": qwen_scope,
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in.running() as running:
        stand_in.use(running, tmp_path / "home", monkeypatch)
        yield running


def test_a_release_of_every_format_is_loaded_from_where_the_page_says(hub: Hub) -> None:
    released = [(repository, path) for repository, path in PLACES if re.match(RELEASES, repository)]
    assert {next(name for name in FILES if repository.startswith(name)) for repository, _ in released} == FILES.keys()
    files: dict[str, dict[str, bytes]] = {}
    for repository, path in released:
        kind = next(name for name in FILES if repository.startswith(name))
        files[repository] = files.get(repository, {}) | FILES[kind](path)
    for repository, content in files.items():
        hub.put(repository, {"README.md": b"a card", **content})
    names = set()
    for repository, path in released:
        sae = flashsae.load(f"hf://{repository}/{path}".rstrip("/"))
        assert torch.isfinite(sae(normal(3, D))).all()
        names.add(sae.config.architecture.name)
    assert names == {"jump_relu", "skip_transcoder:jump_relu", "relu", "topk"}
    ((form, found),) = find("hf://" + "/".join(released[0])).values()
    assert form.read(found).metadata["hookpoint"] == "layers.20"  # the folders of the cache tell it, too

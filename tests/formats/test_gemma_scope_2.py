from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError
from flashsae.formats.gemma_scope_2 import FORMAT
from flashsae.formats.registry import format_named, recognised
from helpers.released import D, F, assert_computes, jump_relu, jump_relu_weights, normal

RESIDUAL = "google/gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_small"
TRANSCODER = "google/gemma-scope-2-4b-pt/transcoder_all/layer_3_width_16k_l0_big"
D_OUT = 5
X = normal(19, D)
CONFIG = {
    "architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output", "width": F, "l0": 20, "affine_connection": False, "type": "sae",
}  # fmt: skip
OF_TRANSCODER = {
    "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output", "type": "transcoder",
}  # fmt: skip


def weights(d_out: int = D, *, affine: bool = False) -> dict[str, Tensor]:
    """Return tensors by the names of the format; w_enc and affine_skip_connection as x @ them."""
    small = {name.replace("W", "w"): weight for name, weight in jump_relu_weights(D, d_out).items()}
    return small | ({"affine_skip_connection": normal(D, d_out, seed=9)} if affine else {})


def made(root: Path, place: str = RESIDUAL, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write the files of one, without a config.json where that is None, and return their folder."""
    folder = root / place
    folder.mkdir(parents=True)
    save_file(weights() if tensors is None else tensors, folder / "params.safetensors")
    if config.get("config", 0) is not None:
        (folder / "config.json").write_text(json.dumps(CONFIG | config), "utf-8")
    return folder


def test_what_is_read_computes_what_was_published(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert_computes(folder, X, *jump_relu(jump_relu_weights(), X))
    assert recognised(folder) is recognised(folder / "params.safetensors") is FORMAT
    content = FORMAT.read(folder)
    assert (content.architecture, content.apply_b_dec_to_input) == ("jump_relu", False)
    assert content.metadata | {"gemma_scope_2": 0} == {
        "model": "google/gemma-3-4b-pt", "hookpoint": "layers.17", "l0": 20.0, "gemma_scope_2": 0,
    }  # fmt: skip
    assert content.metadata["gemma_scope_2"]["hf_hook_point_in"] == "model.layers.17.output"
    assert content.settings == {"target_l0": 20}


@pytest.mark.parametrize("d_out", [D, D_OUT])
@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_adds_what_goes_past_the_code(tmp_path: Path, d_out: int, affine: bool) -> None:
    tensors = weights(d_out, affine=affine)
    folder = made(tmp_path, TRANSCODER, tensors, affine_connection=affine, **OF_TRANSCODER)
    codes, y_hat = jump_relu(jump_relu_weights(D, d_out), X)
    if affine:
        y_hat = y_hat + X.double() @ tensors["affine_skip_connection"].double()
    sae = assert_computes(folder, X, codes, y_hat)
    assert sae.config.architecture.name == f"{'skip_' if affine else ''}transcoder:jump_relu"
    content = FORMAT.read(folder)
    assert content.metadata["hookpoint"] == "layers.3.mlp:in, layers.3.post_feedforward_layernorm"
    if affine:
        assert content.tensors["W_skip"].shape == (d_out, D)
        assert content.tensors["W_skip"].is_contiguous()


@pytest.mark.parametrize(
    ("place", "affine", "architecture", "model", "hookpoint"),
    [
        (RESIDUAL, False, "jump_relu", "google/gemma-3-4b-pt", "layers.17"),
        (
            "google/gemma-scope-2-270m-pt/attn_out_all/layer_0_width_16k_l0_big",
            False,
            "jump_relu",
            "google/gemma-3-270m",
            "layers.0.self_attn.o_proj:in",
        ),
        (
            "models--google--gemma-scope-2-270m-it/snapshots/1a/mlp_out/layer_5_width_65k_l0_small",
            False,
            "jump_relu",
            "google/gemma-3-270m-it",
            "layers.5.post_feedforward_layernorm",
        ),
        (
            TRANSCODER + "_affine",
            True,
            "skip_transcoder:jump_relu",
            "google/gemma-3-4b-pt",
            "layers.3.mlp:in, layers.3.post_feedforward_layernorm",
        ),
        ("transcoder/mine", False, "transcoder:jump_relu", None, None),
        ("mine", False, "jump_relu", None, None),
    ],
)
def test_without_a_config_the_folder_tells_what_it_is(
    tmp_path: Path, place: str, affine: bool, architecture: str, model: str | None, hookpoint: str | None
) -> None:
    content = FORMAT.read(made(tmp_path, place, weights(affine=affine), config=None))
    assert content.architecture == architecture
    assert content.metadata.get("model") == model
    assert content.metadata.get("hookpoint") == hookpoint


@pytest.mark.parametrize("path", ["", "params_layer_1.safetensors"])
def test_a_cross_layer_transcoder_is_refused_with_what_to_take_instead(tmp_path: Path, path: str) -> None:
    save_file(weights(), tmp_path / "params_layer_1.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"type": "clt"}), "utf-8")
    with pytest.raises(CheckpointError, match="take one of the folder transcoder_all"):
        flashsae.load(tmp_path / path)


def test_the_config_tells_a_transcoder_where_nothing_else_does(tmp_path: Path) -> None:
    nothing = {"hf_hook_point_in": None, "hf_hook_point_out": None, "affine_connection": None, "model_name": None}
    content = FORMAT.read(made(tmp_path, "mine", type="transcoder", **nothing))
    assert content.architecture == "transcoder:jump_relu"
    assert content.metadata == {"l0": 20, "gemma_scope_2": {"width": F, "l0": 20, "type": "transcoder"}}


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_what_the_config_calls_cross_layer_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match="is of a cross-layer transcoder or crosscoder"):
        flashsae.load(made(tmp_path, type=kind))


def test_decoders_for_several_layers_are_refused(tmp_path: Path) -> None:
    tensors = weights() | {"w_dec": normal(F, 3, D)}
    with pytest.raises(CheckpointError, match="with decoders for several layers"):
        flashsae.load(made(tmp_path, tensors=tensors))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "topk"}, "architecture: expected one of jump_relu, got 'topk'"),
    "width": ({"width": 16}, r"config.json says width 16, and params.safetensors beside it has 40 latents\. Fetch"),
    "affine": ({"affine_connection": True}, "says that there is an affine connection, and params.safetensors has none"),
    "not affine": (
        {"tensors": weights(affine=True)},
        "says that there is no affine connection, and params.safetensors has one",
    ),
    "l0": ({"l0": -1}, "l0: expected a number of at least 0, got -1"),
    "name": ({"hf_hook_point_in": 3}, "hf_hook_point_in: expected text, got 3"),
    "missing": ({"tensors": {"w_enc": normal(D, F)}}, "it has no b_dec, b_enc, threshold, w_dec; expected"),
    "transposed": (
        {"tensors": weights() | {"w_enc": normal(F, D)}},
        r"w_enc: expected floats \[40, 40\], got float32 \[40, 6\]",
    ),
    "skip": (
        {"tensors": weights(D_OUT) | {"affine_skip_connection": normal(D_OUT, D)}, "affine_connection": True},
        r"affine_skip_connection: expected floats \[6, 5\], got float32 \[5, 6\]",
    ),
    "whole numbers": (
        {"tensors": weights() | {"b_dec": torch.arange(D)}},
        r"b_dec: expected floats .*, got int64 \[6\]",
    ),
    "no number": (
        {"tensors": weights() | {"b_enc": torch.full((F,), float("inf"))}},
        "b_enc holds values that are infinite or no numbers",
    ),
    "empty": ({"tensors": weights() | {"b_enc": torch.zeros(0)}}, "b_enc: expected floats"),
}


@pytest.mark.parametrize(("config", "told"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        flashsae.load(made(tmp_path, **config))
    assert "\n" not in str(caught.value)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for name in ("config.json", "params.safetensors"):
        whole = (folder / name).read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"{" * 5000):
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                flashsae.load(folder)
        (folder / name).write_bytes(whole)
    flashsae.load(folder)


def transcoders(root: Path, layers: int = 3) -> Path:
    """Write one for each layer, as they lie in a repository, and return their folder."""
    for layer in range(layers):
        hooks = {name: value.replace("3", str(layer)) for name, value in OF_TRANSCODER.items()}
        place = f"google/gemma-scope-2-4b-pt/transcoder_all/layer_{layer}_width_16k_l0_big"
        made(root, place, **hooks, affine_connection=None)
    return (root / place).parent


def test_a_folder_of_layers_is_told_by_their_names(tmp_path: Path) -> None:
    folder = transcoders(tmp_path)
    assert FORMAT.parts is not None
    assert list(FORMAT.parts(folder)) == [f"layer_{layer}_width_16k_l0_big" for layer in range(3)]
    assert FORMAT.parts(folder / "layer_1_width_16k_l0_big") == {}
    assert recognised(folder) is FORMAT
    with pytest.raises(CheckpointError, match=r"holds 3 SAEs: layer_0_width_16k_l0_big, .* Name one of them"):
        flashsae.load(folder)
    with pytest.raises(CheckpointError, match=r"holds several SAEs: name one of them, .*layer_0_width_16k_l0_big"):
        FORMAT.read(folder)


def test_transcoders_of_all_layers_become_a_set_of_circuit_tracer(tmp_path: Path) -> None:
    folder, write_set = transcoders(tmp_path), format_named("circuit_tracer").write_set
    assert FORMAT.parts is not None
    assert write_set is not None
    (tmp_path / "set").mkdir()
    assert (
        write_set(tmp_path / "set", {name: FORMAT.read(path) for name, path in FORMAT.parts(folder).items()}, False)
        == []
    )
    told = (tmp_path / "set" / "config.yaml").read_text("utf-8")
    assert "feature_input_hook: mlp.hook_in" in told
    assert "feature_output_hook: hook_mlp_out" in told
    one, same = (flashsae.load(tmp_path / "set" / "layer_2"), flashsae.load(folder / "layer_2_width_16k_l0_big"))
    assert torch.equal(one(X), same(X))


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for place in (tmp_path, tmp_path / "config.json", tmp_path / "params.safetensors", tmp_path / ("x" * 300)):
        assert not FORMAT.detects(place)

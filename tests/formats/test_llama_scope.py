from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError
from flashsae.formats.llama_scope import FORMAT
from flashsae.formats.registry import recognised
from helpers.released import D, F, assert_computes, normal

PLACE = "Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"
X = normal(19, D)
_ROWS = normal(F, D, seed=2)
WEIGHTS = {
    "encoder.weight": normal(F, D), "encoder.bias": normal(F, seed=1),
    "decoder.weight": (_ROWS / _ROWS.norm(dim=1, keepdim=True)).T.contiguous(), "decoder.bias": normal(D, seed=3),
}  # fmt: skip
CONFIG = {
    "d_model": D, "d_sae": F, "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post", "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 8, "act_fn": "jumprelu", "jump_relu_threshold": 0.35546875, "norm_activation": "dataset-wise",
    "top_k": 5, "use_glu_encoder": False, "dataset_average_activation_norm": {"in": 1.8125, "out": 1.8125},
    "sparsity_include_decoder_norm": True,
}  # fmt: skip
OF_TRANSCODER = {
    "hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out",
    "dataset_average_activation_norm": {"in": 2.0, "out": 0.34},
}  # fmt: skip


def published(norm_in: float, norm_out: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Return codes and reconstruction in float64: on normalised activations, and brought back to what came."""
    w = {name: weight.double() for name, weight in WEIGHTS.items()}
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    pre_acts = (s_in * X.double()) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = pre_acts.relu() * (pre_acts / s_in > threshold)  # the threshold is of activations as they come
    return codes, (codes @ w["decoder.weight"].T + w["decoder.bias"]) / s_out


def made(root: Path, place: str = PLACE, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write the files of one, and return their folder; None leaves a setting out."""
    (root / place / "checkpoints").mkdir(parents=True)
    save_file(WEIGHTS if tensors is None else tensors, root / place / "checkpoints" / "final.safetensors")
    told = {name: value for name, value in (CONFIG | config).items() if value is not None}
    (root / place / "hyperparams.json").write_text(json.dumps(told), "utf-8")
    return root / place


def test_norms_are_folded_and_the_threshold_follows(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert_computes(folder, X, *published(1.8125, 1.8125, 0.35546875), rtol=2e-6)
    for path in (folder, folder / "checkpoints", folder / "checkpoints" / "final.safetensors"):
        assert recognised(path) is FORMAT
        assert FORMAT.read(path).metadata == {
            "model": "meta-llama/Llama-3.1-8B", "hookpoint": "layers.15",
            "llama_scope": {
                name: CONFIG[name]
                for name in ("hook_point_in", "hook_point_out", "top_k", "dataset_average_activation_norm")
            },
        }  # fmt: skip
    content = FORMAT.read(folder)
    assert (content.architecture, content.apply_b_dec_to_input) == ("jump_relu", False)
    assert content.settings == {"target_l0": 5}


def test_what_is_folded_is_rounded_once(tmp_path: Path) -> None:
    scale = math.sqrt(D) / 1.8125
    tensors = FORMAT.read(made(tmp_path)).tensors
    assert torch.equal(tensors["W_enc_T"], (WEIGHTS["encoder.weight"].double() * scale).float())
    assert torch.equal(tensors["b_enc"], WEIGHTS["encoder.bias"])
    assert torch.equal(tensors["threshold"], torch.tensor(0.35546875 * scale).expand(F))


def test_half_precision_is_widened_before_it_is_scaled(tmp_path: Path) -> None:
    half = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    scale = math.sqrt(D) / 1.8125
    tensors = FORMAT.read(made(tmp_path, tensors=half)).tensors
    assert torch.equal(tensors["W_enc_T"], (half["encoder.weight"].double() * scale).float())


def test_a_transcoder_has_a_scale_for_either_side(tmp_path: Path) -> None:
    folder = made(tmp_path, "Llama3_1-8B-Base-L8TC-8x", **OF_TRANSCODER)
    sae = assert_computes(folder, X, *published(2.0, 0.34, 0.35546875), rtol=2e-6)
    assert sae.config.architecture.name == "transcoder:jump_relu"
    metadata = FORMAT.read(folder).metadata
    assert "hookpoint" not in metadata  # no module gives what a norm has before its weights
    assert metadata["llama_scope"]["hook_point_in"] == "blocks.8.ln2.hook_normalized"
    assert metadata["saelens"]["hook_name_out"] == "blocks.8.hook_mlp_out"
    assert metadata["circuit_tracer"]["layer"] == 8


@pytest.mark.parametrize(
    ("hook", "hookpoint"), [("blocks.3.hook_mlp_out", "layers.3.mlp"), ("blocks.0.hook_attn_out", "layers.0.self_attn")]
)
def test_hookpoints_are_those_of_the_model(tmp_path: Path, hook: str, hookpoint: str) -> None:
    folder = made(tmp_path, "mine", hook_point_in=hook, hook_point_out=hook)
    assert "model" not in FORMAT.read(folder).metadata
    (folder / "lm_config.json").write_text(json.dumps({"model_name": "meta-llama/Llama-3.1-8B"}), "utf-8")
    assert FORMAT.read(folder).metadata["hookpoint"] == hookpoint


def test_of_a_topk_training_a_threshold_takes_the_place_of_k(tmp_path: Path) -> None:
    assert_computes(made(tmp_path, act_fn="topk"), X, *published(1.8125, 1.8125, 0.35546875), rtol=2e-6)
    inference = made(tmp_path, "inference", act_fn="topk", norm_activation="inference")
    norm = math.sqrt(D)  # of which the scale is 1
    assert_computes(inference, X, *published(norm, norm, 0.35546875))


@pytest.mark.parametrize("included", [False, True])
def test_without_a_threshold_the_k_largest_are_those_by_what_they_write(tmp_path: Path, included: bool) -> None:
    norms = normal(F, seed=8).exp()
    norms[0] = 0.0
    tensors = WEIGHTS | {"decoder.weight": WEIGHTS["decoder.weight"] * norms}
    config = {"act_fn": "topk", "jump_relu_threshold": 0.0, "sparsity_include_decoder_norm": included}
    w = {name: weight.double() for name, weight in tensors.items()}
    scale = math.sqrt(D) / 1.8125
    codes = torch.relu(scale * X.double() @ w["encoder.weight"].T + w["encoder.bias"])
    by = w["decoder.weight"].norm(dim=0) if included else torch.ones(F)
    chosen = (codes * by).topk(5, dim=1).indices
    codes = torch.zeros_like(codes).scatter(1, chosen, codes.gather(1, chosen))
    x_hat = (codes @ w["decoder.weight"].T + w["decoder.bias"]) / scale
    sae = flashsae.load(made(tmp_path, tensors=tensors, **config)).double()
    torch.testing.assert_close(sae(X.double()), x_hat, rtol=1e-5, atol=1e-5)
    assert sae.W_dec.isfinite().all()


def test_relu_and_what_is_left_out(tmp_path: Path) -> None:
    relu = made(tmp_path, act_fn="relu", jump_relu_threshold=None)
    assert_computes(relu, X, *published(1.8125, 1.8125, 0.0), rtol=2e-6)
    few = {"d_model", "d_sae", "hook_point_in", "jump_relu_threshold", "dataset_average_activation_norm"}
    folder = made(tmp_path, "few", **{name: None for name in CONFIG if name not in few})
    assert_computes(folder, X, *published(1.8125, 1.8125, 0.35546875), rtol=2e-6)


def test_without_a_bias_of_the_decoder_it_is_0(tmp_path: Path) -> None:
    tensors = {name: weight for name, weight in WEIGHTS.items() if name != "decoder.bias"}
    assert not flashsae.load(made(tmp_path, tensors=tensors, use_decoder_bias=False)).b_dec.any()


def test_a_bias_that_is_subtracted_stays_so(tmp_path: Path) -> None:
    w = {name: weight.double() for name, weight in WEIGHTS.items()}
    scale = math.sqrt(D) / 1.8125
    pre_acts = (scale * X.double() - w["decoder.bias"]) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = pre_acts.relu() * (pre_acts / scale > 0.35546875)
    x_hat = (codes @ w["decoder.weight"].T + w["decoder.bias"]) / scale
    sae = assert_computes(made(tmp_path, apply_decoder_bias_to_pre_encoder=True), X, codes, x_hat, rtol=2e-6)
    assert sae.config.apply_b_dec_to_input


def test_tokens_may_be_normalised_one_by_one(tmp_path: Path) -> None:
    w = {name: weight.double() for name, weight in WEIGHTS.items()}
    scale = math.sqrt(D) / X.double().norm(dim=1, keepdim=True)
    pre_acts = (scale * X.double()) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = pre_acts.relu() * (pre_acts > 0.35546875)
    x_hat = (codes @ w["decoder.weight"].T + w["decoder.bias"]) / scale
    assert_computes(made(tmp_path, norm_activation="token-wise"), X, codes, x_hat)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gates": ({"use_glu_encoder": True}, "is not read: use_glu_encoder multiplies latents with gates"),
    "batches": ({"norm_activation": "batch-wise"}, "makes the codes of a token depend on the tokens beside it"),
    "bias": (
        {"apply_decoder_bias_to_pre_encoder": True, **OF_TRANSCODER},
        "subtracts the bias of the output from the input of a transcoder",
    ),
    "tokens": (
        {"norm_activation": "token-wise", **OF_TRANSCODER},
        "divides the output of a transcoder by its own norm",
    ),
    "no norms": ({"dataset_average_activation_norm": None}, "needs dataset_average_activation_norm with in and out"),
    "one norm": ({"dataset_average_activation_norm": {"in": 1.0}}, "dataset_average_activation_norm with in and out"),
    "norm of 0": ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, r"activation_norm\.in: expected a number"),
    "activation": ({"act_fn": "gelu"}, "act_fn: expected one of jumprelu, topk, relu, got 'gelu'"),
    "k": ({"act_fn": "topk", "jump_relu_threshold": 0, "top_k": 41}, "top_k is 41 of 40 latents"),
    "width": ({"d_model": 5}, r"decoder.bias: expected floats \[5\], got float32 \[6\]|encoder.weight: expected"),
    "latents": ({"d_sae": 39}, r"decoder\.weight: expected floats \[6, 39\]"),
    "no width": ({"d_model": None}, "d_model: expected a whole number, got nothing"),
    "missing": (
        {"tensors": {"encoder.bias": torch.zeros(F)}},
        "it has no decoder.bias, decoder.weight, encoder.weight",
    ),
    "no number": ({"tensors": WEIGHTS | {"decoder.bias": torch.full((D,), float("nan"))}}, "decoder.bias holds values"),
}


@pytest.mark.parametrize(("config", "told"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_told(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        flashsae.load(made(tmp_path, **config))
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for name in ("hyperparams.json", "checkpoints/final.safetensors"):
        whole = (folder / name).read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"[1]"):
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                flashsae.load(folder)
        (folder / name).write_bytes(whole)
    (folder / "lm_config.json").write_text("[]", "utf-8")
    flashsae.load(folder)
    (folder / "checkpoints" / "final.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"final\.safetensors"):
        flashsae.load(folder)


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "final.safetensors").touch()
    for place in (
        tmp_path,
        tmp_path / "checkpoints",
        tmp_path / "checkpoints/final.safetensors",
        tmp_path / ("x" * 300),
    ):
        assert not FORMAT.detects(place)
    assert not FORMAT.detects(Path("/"))

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashsae.errors import ConfigError
from flashsae.formats import sae_lens
from flashsae.formats.content import Content
from flashsae.sae.saved import sae_of
from helpers.contents import random_content
from helpers.sae_lens_files import D, F, K, check_equal, foreign, written

HELD = {
    "topk": "topk",
    "matryoshka:topk": "topk",
    "hierarchical_topk": "topk",
    "abs_topk": "abstopk",
    "batch_topk": "jumprelu",
    "matryoshka": "jumprelu",
    "jump_relu": "jumprelu",
    "matryoshka:jump_relu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
    "transcoder:relu": "transcoder",
    "transcoder:jump_relu": "jumprelu_transcoder",
    "transcoder:batch_topk": "jumprelu_transcoder",
    "skip_transcoder:relu": "skip_transcoder",
    "skip_transcoder:jump_relu": "jumprelu_skip_transcoder",
    "skip_transcoder:matryoshka": "jumprelu_skip_transcoder",
}
TENSORS = {
    "gated": {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)},
    "jumprelu": {"b_enc": (F,), "threshold": (F,)},
    "skip": {"b_enc": (F,), "W_skip": (D, D)},
    "": {"b_enc": (F,)},
}


def an_sae(architecture: str, **changes: Any) -> Content:
    base = architecture.rpartition(":")[2]
    settings = {"relu": {}, "gated": {}, "jump_relu": {"target_l0": 4.0}}.get(base, {"k": K})
    place = "h.6.mlp:in, h.6.mlp" if "transcoder" in architecture else "h.6"
    content = random_content(architecture, D, F, metadata={"model": "gpt2", "hookpoint": place}, **settings)
    return replace(content, **changes)


@pytest.mark.parametrize("architecture", HELD)
def test_every_architecture_that_both_hold_is_written_exactly_and_comes_back(architecture: str, tmp_path: Path) -> None:
    content = an_sae(architecture)
    config, w = written(tmp_path, content)
    form = HELD[architecture]
    own = next(shapes for key, shapes in TENSORS.items() if key in form)
    extra = {"W_skip": (D, D)} if "skip" in form else {}
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == {
        "W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), **own, **extra,
    }  # fmt: skip
    assert (config["architecture"], config["d_in"], config["d_sae"], config["dtype"]) == (form, D, F, "float32")
    assert config.get("k") == (K if form in ("topk", "abstopk") else None)
    assert config.get("d_out") == (D if "transcoder" in form else None)
    assert config["apply_b_dec_to_input"] is ("transcoder" not in form)
    assert torch.equal(w["W_enc"], content.tensors["W_enc_T"].T)
    check_equal(content, config, w)
    assert sae_lens.detects(tmp_path)
    again = sae_lens.read(tmp_path)
    assert (again.architecture, again.metadata, again.extras) == (architecture, content.metadata, {})
    assert sae_of(again).config == sae_of(content).config
    assert again.tensors.keys() == content.tensors.keys()
    for name, tensor in content.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
        assert again.tensors[name].is_contiguous()


def test_what_saelens_knows_beside_is_kept_and_written_again(tmp_path: Path) -> None:
    metadata = {
        "sae_lens_version": "6.2.1", "sae_lens_training_version": "5.1", "model_name": "gpt2-small", "l0": float("nan"),
        "hook_name": "blocks.6.attn.hook_z", "hook_head_index": None, "context_size": 1024, "prepend_bos": False,
        "model_from_pretrained_kwargs": {"fold_ln": False}, "neuronpedia_id": "gpt2-small/6-att", "mine": [1, {"a": 2}],
    }  # fmt: skip
    sparsity = torch.tensor([-10.0, *torch.linspace(-5, 0, F - 1)])
    foreign(tmp_path, "topk", k=K, reshape_activations="hook_z", metadata=metadata)
    save_file({"sparsity": sparsity}, tmp_path / "sparsity.safetensors")
    content = sae_lens.read(tmp_path)
    assert content.metadata["hookpoint"] == "h.6.attn.c_proj:in"
    assert content.metadata["prepend_bos"] is False
    density = content.extras["latent_density"]
    torch.testing.assert_close(density, (10 ** sparsity.double() - 1e-10).float())
    assert density[0] == 0
    config, _ = written(tmp_path / "again", content)
    kept = config["metadata"]
    assert {name: kept[name] for name in metadata} == {**metadata, "l0": None}
    assert config["reshape_activations"] == "hook_z"
    torch.testing.assert_close(load_file(tmp_path / "again" / "sparsity.safetensors")["sparsity"], sparsity)
    again = sae_lens.read(tmp_path / "again")
    assert again.metadata == {
        **content.metadata,
        "saelens": {**content.metadata["saelens"], **again.metadata["saelens"]},
    }
    foreign(tmp_path / "apart", "topk", k=K, metadata=metadata)  # of heads beside each other already
    assert written(tmp_path / "together", sae_lens.read(tmp_path / "apart"))[0]["reshape_activations"] == "none"
    save_file({"sparsity": torch.full((F,), -torch.inf)}, tmp_path / "apart" / "sparsity.safetensors")
    assert torch.equal(sae_lens.read(tmp_path / "apart").extras["latent_density"], torch.zeros(F))
    moved, _ = written(tmp_path / "moved", replace(content, metadata={**content.metadata, "hookpoint": "h.3"}))
    assert moved["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert moved["metadata"]["mine"] == metadata["mine"]


REFUSED = {
    "transcoder": "its transcoders have a ReLU or thresholds, and no TopK; the formats sparsify and circuit_tracer",
    "skip_transcoder:matryoshka:topk": "its transcoders have a ReLU or thresholds, and no TopK",
    "transcoder:abs_topk": "cannot hold an SAE of the architecture transcoder:abs_topk: it has .* gated, .*relu",
    "transcoder:gated": "the architecture transcoder:gated: it has .*; the format flashsae holds any",
}


@pytest.mark.parametrize("architecture", REFUSED)
@pytest.mark.parametrize("lossy", [True, False])
def test_what_saelens_has_no_architecture_for_is_refused(architecture: str, lossy: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[architecture]):
        sae_lens.write(tmp_path, an_sae(architecture), lossy)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals_of_writing_are_one_sentence_each(tmp_path: Path) -> None:
    crosscoder = random_content("crosscoder", D, F, k=K, widths=(3, 4), sites=("a", "b"))
    with pytest.raises(
        ConfigError, match=r"architecture crosscoder: it has no SAE of several sites; the format flashsae"
    ):
        sae_lens.write(tmp_path, crosscoder)
    with pytest.raises(
        ConfigError, match=r"architecture mine: it has .*, topk, transcoder relu, .*; the format flashsae"
    ):
        sae_lens.write(tmp_path, replace(an_sae("topk"), architecture="mine"))
    without = an_sae("batch_topk")
    tensors = {name: tensor for name, tensor in without.tensors.items() if name != "threshold"}
    with pytest.raises(ConfigError, match=r"latents are above a threshold there, and this SAE has none; train it"):
        sae_lens.write(tmp_path, replace(without, tensors=tensors))
    with pytest.raises(ConfigError, match=r"subtracts no b_dec from the input of a transcoder, and this one does\."):
        sae_lens.write(tmp_path, an_sae("transcoder:relu", apply_b_dec_to_input=True))
    for wrong in (float("nan"), object()):
        with pytest.raises(ConfigError, match=r"metadata: expected what JSON can hold"):
            sae_lens.write(tmp_path, an_sae("topk", metadata={"a": wrong}))
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_up_is_given_up_where_it_may_be_and_told(tmp_path: Path) -> None:
    content = an_sae(
        "jump_relu", extras={"latent_density": torch.rand(F), "label": torch.arange(F), "age": torch.arange(F)}
    )
    content.tensors["threshold"][2] = -0.5
    said = (
        r"thresholds below 0 became 0, since SAELens has a ReLU before them; what is known of latents as age, label "
        r"was left out, since SAELens has no place for it\. --lossy, or lossy=True, writes it so\."
    )
    with pytest.raises(ConfigError, match=rf"^SAELens cannot hold all of this SAE: {said}$"):
        sae_lens.write(tmp_path, content)
    assert list(tmp_path.iterdir()) == []
    given_up = sae_lens.write(tmp_path, content, lossy=True)
    assert [sentence.partition(" ")[0] for sentence in given_up] == ["Thresholds", "What"]
    again = sae_lens.read(tmp_path)
    assert torch.equal(again.tensors["threshold"], content.tensors["threshold"].clamp_min(0))
    torch.testing.assert_close(again.extras, {"latent_density": content.extras["latent_density"]})
    below = an_sae("batch_topk")
    below.tensors["threshold"].fill_(-0.5)  # whose activations go through a ReLU here, too
    check_equal(below, *written(tmp_path / "below", below))


def test_names_for_what_transformer_lens_does_not_know_are_those_of_the_model_itself(tmp_path: Path) -> None:
    def named(model: str, hookpoint: str, architecture: str = "relu") -> dict[str, Any]:
        content = an_sae(architecture, metadata={"model": model, "hookpoint": hookpoint, "context_length": 64})
        metadata: dict[str, Any] = written(tmp_path, content)[0]["metadata"]
        assert metadata["model_from_pretrained_kwargs"] == {}
        assert (metadata["context_size"], metadata["prepend_bos"], metadata["neuronpedia_id"]) == (64, True, None)
        return metadata

    plain = named("openai-community/gpt2", "h.6")
    assert plain["model_name"] == "gpt2"
    assert plain["model_class_name"] == "HookedTransformer"
    assert plain["hook_name"] == "blocks.6.hook_resid_post"
    assert plain["hf_hook_name"] == "transformer.h.6"
    within = named("google/gemma-2-2b", "layers.6.mlp.up_proj.something")
    assert (within["model_class_name"], within["hook_name"]) == (
        "AutoModelForCausalLM", "model.layers.6.mlp.up_proj.something",
    )  # fmt: skip
    assert named("somebody/model", "layers.6:in")["hook_name"] == "blocks.6.hook_resid_pre"
    inside = named("gpt2", "h.6.ln_1:in")
    assert (inside["hook_name"], inside["hf_hook_name"]) == (None, "transformer.h.6.ln_1.input")
    module = named("gpt2", "h.6.mlp", "transcoder:relu")
    assert (module["hook_name"], module["hook_name_out"]) == ("blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out")
    assert named("", "")["model_name"] is None
    content = sae_lens.read(
        foreign(tmp_path / "theirs", "standard", metadata={"sae_lens_version": "6", **within, "flashsae": 1})
    )
    assert content.metadata["hookpoint"] == "model.layers.6.mlp.up_proj.something"
    for name, value in (("hook_head_index", 3), ("model_from_pretrained_kwargs", {"center_writing_weights": True})):
        apart = {"sae_lens_version": "6", **plain, name: value, "flashsae": None}  # which no module here gives
        metadata = sae_lens.read(foreign(tmp_path / "theirs", "standard", metadata=apart)).metadata
        assert "hookpoint" not in metadata
        assert metadata["saelens"][name] == value
    gemma = {"sae_lens_version": "6", "hf_hook_name": "model.layers.9.output", "model_name": "gemma-3-1b-pt"}
    assert (
        sae_lens.read(foreign(tmp_path / "theirs", "standard", metadata=gemma)).metadata["hookpoint"]
        == "model.layers.9"
    )


def test_what_is_kept_of_ours_is_believed_only_where_it_fits(tmp_path: Path) -> None:
    content = an_sae("matryoshka:topk")
    config, _ = written(tmp_path, content)
    own = config["metadata"]["flashsae"]
    assert sae_lens.read(tmp_path).architecture == "matryoshka:topk"
    for wrong in (
        {"architecture": "batch_topk"}, {"architecture": "matryoshka:" * 3000 + "topk"}, {"architecture": None},
        {"settings": None}, {"settings": {"k": K + 1}}, {"settings": {"k": K, "no": 1}}, {"settings": {"k": "x"}},
        {"architecture": "os:system"}, {"settings": {"k": K, "prefixes": []}},
    ):  # fmt: skip
        config["metadata"]["flashsae"] = {**own, **wrong}
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert sae_lens.read(tmp_path).architecture == "topk"
    config["metadata"]["flashsae"] = {**own, "settings": {"k": K}}  # as from a version that had no other ones
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert sae_lens.read(tmp_path).settings["prefixes"] == own["settings"]["prefixes"]
    for block in (None, [], "x", {}, {**own, "numbers": {"k": 1, "unit": "x"}, "metadata": 3}):
        config["metadata"]["flashsae"] = block
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert sae_lens.read(tmp_path).settings["k"] == K
    config, _ = written(tmp_path, an_sae("jump_relu"))
    own = config["metadata"]["flashsae"]
    for number in (1e400, 10**400, True, "x", None, [1]):
        config["metadata"]["flashsae"] = {**own, "numbers": {"unit": number, "threshold": 3.0, "W_dec": 1.0}}
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        again = sae_lens.read(tmp_path)
        assert "unit" not in again.tensors
        assert again.tensors["threshold"].shape == (F,)


def test_a_folder_is_known_by_its_two_files_and_one_of_several_by_theirs(tmp_path: Path) -> None:
    one = foreign(tmp_path / "one", "topk", k=K)
    for path in (one, one / "cfg.json", one / "sae_weights.safetensors"):
        assert sae_lens.detects(path)
        assert sae_lens.read(path).settings == {"k": K}
    assert sae_lens.parts(one) == {}
    (tmp_path / "deep" / "layer_3").mkdir(parents=True)
    other = foreign(tmp_path / "deep" / "layer_3" / "16k", "topk", k=K)
    assert sae_lens.parts(tmp_path) == {"one": one, "deep/layer_3/16k": other}
    assert sae_lens.detects(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none", tmp_path / "none" / "cfg.json", Path("a\0b"), Path("x" * 5000)):
        assert not sae_lens.detects(path)
        assert sae_lens.parts(path) == {}

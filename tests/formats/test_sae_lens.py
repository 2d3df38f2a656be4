from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning
from flashsae.formats import sae_lens
from flashsae.formats.content import Content
from flashsae.testing import assert_as_accurate
from helpers.contents import random_content, sae_of

D, F, K = 7, 37, 5
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


def written(folder: Path, content: Content, *, lossy: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder.mkdir(exist_ok=True)
    sae_lens.write(folder, content, lossy)
    return json.loads((folder / "cfg.json").read_text("utf-8")), load_file(folder / "sae_weights.safetensors")


def theirs(config: dict[str, Any], w: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what SAELens makes of x by its definitions: its code and its reconstruction."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(w["W_dec"].dtype)
        tokens, undo = x, lambda x_hat: x_hat
        if config["normalize_activations"] == "constant_norm_rescale":
            factor = config["d_in"] ** 0.5 / x.norm(dim=-1, keepdim=True)
            tokens, undo = x * factor, lambda x_hat: x_hat / factor
        centred = tokens - w["b_dec"] if config["apply_b_dec_to_input"] else tokens
        z = centred @ w["W_enc"] + w.get("b_enc", torch.zeros(()))
        if config.get("rescale_acts_by_decoder_norm"):
            z = z * w["W_dec"].norm(dim=1)
        code = z.relu()
        if config["architecture"] in ("topk", "abstopk"):
            is_signed = config["architecture"] == "abstopk"
            chosen = (z.abs() if is_signed else z).topk(config["k"]).indices
            code = torch.zeros_like(z).scatter(-1, chosen, (z if is_signed else z.relu()).gather(-1, chosen))
        if "threshold" in w:
            code = code * (z > w["threshold"])
        if config["architecture"] == "gated":
            code = (z * w["r_mag"].exp() + w["b_mag"]).relu() * (z + w["b_gate"] > 0)
        f = code / w["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else code
        x_hat = undo(f @ w["W_dec"] + w["b_dec"])
        return code, x_hat + x @ w["W_skip"].T if "W_skip" in w else x_hat

    return forward


def ours(content: Content) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    sae = sae_of(content)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return sae.encode(x).to_dense(), sae(x)

    return forward


def check_equal(content: Content, config: dict[str, Any], w: dict[str, Tensor]) -> None:
    """Check that both make the same of tokens, as accurately as SAELens's definitions in this dtype."""
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1), dtype=content.dtype)
    exact = theirs(config, {name: tensor.double() for name, tensor in w.items()})
    for of_ours, of_theirs, of_exact in zip(ours(content)(x), theirs(config, w)(x), exact(x.double())):
        assert_as_accurate(of_ours, of_theirs, of_exact)


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


def foreign(folder: Path, architecture: Any, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write a folder as SAELens does; a tensor of None or setting of ... is left out."""
    g = torch.Generator().manual_seed(3)
    w = {"W_enc": torch.randn(D, F, generator=g), "W_dec": torch.randn(F, D, generator=g) * 0.3}
    w |= {"b_enc": torch.randn(F, generator=g), "b_dec": torch.randn(D, generator=g)}
    w |= tensors or {}
    folder.mkdir(exist_ok=True)
    save_file({name: tensor for name, tensor in w.items() if tensor is not None}, folder / "sae_weights.safetensors")
    content = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small"}, **config,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return folder


def check_read(folder: Path, **as_if: Any) -> Content:
    """Read a folder and check that it does what SAELens makes of it; return it."""
    content = sae_lens.read(folder)
    config = {**json.loads((folder / "cfg.json").read_text("utf-8")), **as_if}
    check_equal(content, config, load_file(folder / "sae_weights.safetensors"))
    return content


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_decoder_norms_are_folded_where_selection_goes_by_them(architecture: str, tmp_path: Path) -> None:
    foreign(tmp_path, architecture, k=K, rescale_acts_by_decoder_norm=True)
    content = check_read(tmp_path)
    torch.testing.assert_close(content.tensors["W_dec"].norm(dim=1), torch.ones(F))
    w = load_file(tmp_path / "sae_weights.safetensors")
    w["W_dec"][3] = 0
    content = sae_lens.read(foreign(tmp_path, architecture, w, k=K, rescale_acts_by_decoder_norm=True))
    assert all(tensor.isfinite().all() for tensor in content.tensors.values())
    plain = sae_lens.read(foreign(tmp_path, architecture, w, k=K))
    assert torch.equal(plain.tensors["W_dec"], w["W_dec"])


def test_without_a_k_it_is_the_one_that_saelens_takes(tmp_path: Path) -> None:
    assert sae_lens.read(foreign(tmp_path, "topk")).settings == {"k": 100}


@pytest.mark.parametrize(("form", "k"), [("batchtopk", 4), ("batchtopk", 4.4), ("matryoshka_batchtopk", 4.4)])
def test_trainings_that_were_not_ended_are_read_with_their_threshold(form: str, k: float, tmp_path: Path) -> None:
    threshold = {"topk_threshold": torch.tensor(0.123456789123, dtype=torch.float64)}
    foreign(tmp_path, form, threshold, k=k, matryoshka_widths=[9, 20, F], normalize_activations="none")
    content = sae_lens.read(tmp_path)
    settings = {"k": 4, **({"prefixes": [9.0, 20.0, float(F)]} if "matryoshka" in form else {})}
    assert (content.architecture, dict(content.settings)) == (
        form.partition("_")[0].replace("batcht", "batch_t"),
        settings,
    )
    w = load_file(tmp_path / "sae_weights.safetensors")
    ended = {**w, "threshold": w.pop("topk_threshold").float().expand(F)}
    del ended["topk_threshold"]
    config = json.loads((tmp_path / "cfg.json").read_text("utf-8"))
    check_equal(content, {**config, "rescale_acts_by_decoder_norm": True}, ended)
    assert sae_of(content).config.k == 4


@pytest.mark.parametrize("trained", ["batchtopk", "matryoshka_batchtopk"])
def test_a_jumprelu_that_was_trained_with_one_threshold_is_what_it_was(trained: str, tmp_path: Path) -> None:
    details = {"k": 3.6, "matryoshka_widths": [5, F]}
    metadata = {"sae_lens_version": "6.0.0", "training_architecture": trained, "training_architecture_details": details}
    foreign(tmp_path, "jumprelu", {"threshold": torch.full((F,), 0.7)}, metadata=metadata)
    content = check_read(tmp_path)
    assert content.tensors["threshold"].shape == ()
    assert content.settings == {"k": 4, **({} if trained == "batchtopk" else {"prefixes": [5.0, float(F)]})}
    again, _ = written(tmp_path / "again", content)
    assert again["metadata"]["training_architecture_details"] == details
    several = foreign(tmp_path, "jumprelu", {"threshold": torch.arange(F) / 9}, metadata=metadata)
    assert check_read(several).architecture == "jump_relu"


def test_jumprelu_has_a_relu_before_its_thresholds(tmp_path: Path) -> None:
    threshold = torch.linspace(-1, 1, F)
    content = check_read(
        foreign(tmp_path, "jumprelu", {"threshold": threshold}, metadata={"sae_lens_version": "6", "l0": 9})
    )
    assert torch.equal(content.tensors["threshold"], threshold.clamp_min(0))
    assert content.settings == {"target_l0": 9.0}
    old = foreign(tmp_path, "jumprelu", {"log_threshold": torch.linspace(-3, 1, F)})
    torch.testing.assert_close(sae_lens.read(old).tensors["threshold"], torch.linspace(-3, 1, F).exp())


def test_what_saelens_does_not_do_to_b_dec_and_tokens_is_kept(tmp_path: Path) -> None:
    content = sae_lens.read(foreign(tmp_path, "standard", apply_b_dec_to_input=False))
    assert content.apply_b_dec_to_input is False
    config, w = written(tmp_path / "again", content)
    assert config["apply_b_dec_to_input"] is False
    assert torch.equal(w["b_enc"], load_file(tmp_path / "sae_weights.safetensors")["b_enc"])
    for name, here in (("layer_norm", "layer_norm"), ("constant_norm_rescale", "token_norm"), (None, "none")):
        content = sae_lens.read(foreign(tmp_path, "standard", normalize_activations=name))
        assert content.normalize_activations == here
        again = written(tmp_path / "again", content)[0]["normalize_activations"]
        assert again == (name or "none")


def test_a_scale_of_activations_is_told_and_not_applied(tmp_path: Path) -> None:
    folder = foreign(tmp_path, "standard", normalize_activations="expected_average_only_in")
    with pytest.warns(FlashSAEWarning, match=r"takes activations as they come\. .* factor is √d_in over the mean norm"):
        check_read(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.375}')
    with pytest.warns(FlashSAEWarning, match=r"the factor is 0\.375\."):
        content = check_read(folder)
    assert content.normalize_activations == "none"
    with pytest.raises(CheckpointError, match="of whitened activations: SAELens folds the whitening"):
        sae_lens.read(foreign(tmp_path, "standard", normalize_activations="covariance_whitening"))


def test_weights_are_of_the_dtype_that_saelens_casts_them_to(tmp_path: Path) -> None:
    threshold = {"threshold": torch.rand(F)}
    folder = foreign(
        tmp_path, "jumprelu", {**threshold, "b_dec": torch.randn(D, dtype=torch.float64)}, dtype="torch.bfloat16"
    )
    content = sae_lens.read(folder)
    assert {tensor.dtype for tensor in content.tensors.values()} == {torch.bfloat16}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        config, w = written(tmp_path / f"{dtype}", an_sae("topk", tensors=an_sae("topk").tensors))
        content = random_content("gated", D, F, dtype=dtype)
        config, w = written(tmp_path / f"{dtype}", content)
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert {tensor.dtype for tensor in w.values()} == {dtype}
        again = sae_lens.read(tmp_path / f"{dtype}")
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in content.tensors.items())


OLD = {"hook_point": "blocks.6.attn.hook_z", "model_name": "gpt2-small", "context_size": 128, "dataset_path": "owt"}


def test_files_of_before_version_6_are_read_as_saelens_reads_them(tmp_path: Path) -> None:
    none = dict.fromkeys(["apply_b_dec_to_input", "normalize_activations", "reshape_activations"], ...)
    old = {**none, "metadata": ..., **OLD}
    content = check_read(
        foreign(tmp_path, ..., **old),
        architecture="standard",
        normalize_activations="none",
        apply_b_dec_to_input=True,
    )
    assert content.architecture == "relu"
    assert content.metadata["model"] == "gpt2"
    assert content.metadata["hookpoint"] == "h.6.attn.c_proj:in"
    assert (content.metadata["context_length"], content.metadata["dataset"], content.metadata["prepend_bos"]) == (
        128,
        "owt",
        True,
    )
    assert content.metadata["saelens"]["reshape_activations"] == "hook_z"
    topk = {**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    assert sae_lens.read(foreign(tmp_path, "standard", **topk)).settings == {"k": K}
    named = {
        **OLD,
        "activation_fn": "topk",
        "activation_fn_kwargs": {"k": K},
        "sae_lens_version": "5.9.1",
        "metadata": {"mine": 1},
    }
    content = sae_lens.read(foreign(tmp_path, ..., **named))
    assert (content.architecture, content.metadata["saelens"]["mine"]) == ("topk", 1)
    with pytest.warns(FlashSAEWarning, match="expected_average_only_in"):
        sae_lens.read(foreign(tmp_path, ..., **{**old, "normalize_activations": True}))
    for activation, what in (("tanh-relu", "tanh-relu"), ("topk", "topk without a k")):
        with pytest.raises(CheckpointError, match=f"its activation_fn is {what}, which SAELens reads as relu since"):
            sae_lens.read(foreign(tmp_path, ..., **{**old, "activation_fn_str": activation}))


def test_a_scaling_factor_of_a_finetuning_is_folded_and_one_of_ones_passed_over(tmp_path: Path) -> None:
    ones, factor = torch.ones(F), torch.linspace(0.5, 2, F)
    content = sae_lens.read(foreign(tmp_path, "standard", {"scaling_factor": ones}, metadata=...))
    W_dec = load_file(tmp_path / "sae_weights.safetensors")["W_dec"]
    assert torch.equal(content.tensors["W_dec"], W_dec)
    content = sae_lens.read(foreign(tmp_path, "standard", {"scaling_factor": factor}, finetuning_scaling_factor=True))
    torch.testing.assert_close(content.tensors["W_dec"], W_dec * factor[:, None], rtol=1e-7, atol=0)
    with pytest.raises(
        CheckpointError, match=r"has a scaling_factor, and finetuning_scaling_factor in cfg\.json says that"
    ):
        sae_lens.read(foreign(tmp_path, "standard", {"scaling_factor": factor}))


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
    moved, _ = written(tmp_path / "moved", replace(content, metadata={**content.metadata, "hookpoint": "h.3"}))
    assert moved["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert moved["metadata"]["mine"] == metadata["mine"]


REFUSED = {
    "transcoder": "its transcoders have a ReLU or thresholds, and no TopK; the formats sparsify and circuit_tracer",
    "skip_transcoder:matryoshka:topk": "its transcoders have a ReLU or thresholds, and no TopK",
    "transcoder:abs_topk": "SAELens cannot hold an SAE of the architecture transcoder:abs_topk: it has .* gated, .*relu",
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
    for wrong in (float("nan"), tmp_path):
        with pytest.raises(ConfigError, match=r"metadata: expected what JSON can hold"):
            sae_lens.write(tmp_path, an_sae("topk", metadata={"a": wrong}))
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_up_is_given_up_where_it_may_be_and_told(tmp_path: Path) -> None:
    content = an_sae(
        "jump_relu", extras={"latent_density": torch.rand(F), "label": torch.arange(F), "age": torch.arange(F)}
    )
    content.tensors["threshold"][2] = -0.5
    said = (
        r"thresholds below 0 became 0, since SAELens has a ReLU before them; what is known of latents as age, label was "
        r"left out, since SAELens has no place for it\. --lossy, or lossy=True, writes it so\."
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


WRONG: dict[str, list[tuple[Any, str]]] = {
    "architecture": [
        (..., "architecture: expected a name, got nothing"), (3, "architecture: expected a name, got 3"),
        ("temporal", "of the architecture temporal, which FlashSAE does not have: its codes depend on the tokens before"),
        ("matching_pursuit", "matching_pursuit, which FlashSAE does not have: its latents are chosen one after the other"),
        ("mine", "expected one of standard, gated, .* got 'mine'"),
    ],
    "d_in": [
        (D + 1, r"W_dec: expected floats \[37, 8\], got float32"), (..., "d_in: expected a whole number"),
        (0, "d_in: expected a number from 1"), (-7, "d_in"), (7.0, "d_in"), (True, "d_in"), (10**30, "d_in"), ("7", "d_in"),
    ],
    "d_sae": [(F - 1, r"expected floats \[36"), (None, "d_sae"), (float("nan"), "d_sae"), ([37], "d_sae")],
    "k": [
        (float("nan"), "k: expected a whole number, got nan"), (0, "k: expected"), (-1, "k: expected"), (2.5, "k: expected a"),
        (True, "k: expected"), ("5", "k: expected a whole number, got 5"), (None, "k: expected a whole number, got None"),
    ],
    "dtype": [("float8", "dtype: expected one of float32"), (3, "dtype"), ("torch.int8", "dtype")],
    "apply_b_dec_to_input": [("yes", "apply_b_dec_to_input: expected true or false"), (1, "apply_b_dec_to_input")],
    "normalize_activations": [("other", "normalize_activations: expected one of none, layer_norm"), (True, "normalize")],
    "rescale_acts_by_decoder_norm": [(1, "rescale_acts_by_decoder_norm: expected true or false")],
    "metadata": [
        ([], "metadata: expected an object"), ("x", "metadata: expected an object"), (None, "metadata: expected an object"),
        ({"sae_lens_version": "new"}, "sae_lens_version: expected one, got 'new'"), ({"sae_lens_version": 6}, "got '6'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_setting_is_one_sentence(name: str, tmp_path: Path) -> None:
    for wrong, said in WRONG[name]:
        config = {"k": K, "metadata": {"sae_lens_version": "6.54.12"}, name: wrong}
        foreign(tmp_path, config.pop("architecture", "topk"), **config)
        with pytest.raises(CheckpointError, match=said) as caught:
            sae_lens.read(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_transcoder_has_its_own_refusals(tmp_path: Path) -> None:
    config: dict[str, Any] = {"d_out": 3, "apply_b_dec_to_input": False}
    w = {"W_dec": torch.randn(F, 3), "b_dec": torch.randn(3)}
    content = check_read(foreign(tmp_path, "transcoder", w, **config))
    assert (content.architecture, content.d_out, content.apply_b_dec_to_input) == ("transcoder:relu", 3, False)
    assert sae_lens.read(foreign(tmp_path, "transcoder", w, apply_b_dec_to_input=...)).d_out == 3
    skip = check_read(foreign(tmp_path, "skip_transcoder", {**w, "W_skip": torch.randn(3, D)}, **config))
    assert (skip.architecture, skip.tensors["W_skip"].shape) == ("skip_transcoder:relu", (3, D))
    with pytest.raises(
        CheckpointError, match="apply_b_dec_to_input: expected false of a transcoder, whose b_dec is of"
    ):
        sae_lens.read(foreign(tmp_path, "transcoder", w, **{**config, "apply_b_dec_to_input": True}))
    with pytest.raises(
        CheckpointError, match="layer_norm of a transcoder, which SAELens does to the input and does not"
    ):
        sae_lens.read(foreign(tmp_path, "transcoder", w, normalize_activations="layer_norm", **config))
    with pytest.raises(CheckpointError, match=r"W_dec: expected floats \[37, 4\], got float32 \[37, 3\]"):
        sae_lens.read(foreign(tmp_path, "transcoder", w, **{**config, "d_out": 4}))
    with pytest.raises(CheckpointError, match="it has no W_skip"):
        sae_lens.read(foreign(tmp_path, "skip_transcoder", w, **config))


def test_damaged_and_foreign_files_are_one_sentence_each(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            sae_lens.read(tmp_path)
        assert "\n" not in str(caught.value)

    long = torch.zeros(3)
    for tensors, said in (
        ({"W_dec": None}, r"it has no W_dec; expected W_dec, W_enc, b_dec, b_enc, scaling_factor"),
        ({"extra": long}, "extra is none of its tensors"),
        ({"threshold": torch.zeros(F)}, "threshold is none of its tensors"),
        ({"b_enc": torch.zeros(F + 1)}, r"b_enc: expected floats \[37\], got float32 \[38\]"),
        ({"W_enc": torch.zeros(F, D)}, r"W_enc: expected floats \[7, 37\], got float32 \[37, 7\]"),
        ({"b_dec": torch.zeros(D, dtype=torch.int32)}, r"b_dec: expected floats \[7\], got int32 \[7\]"),
        ({"W_dec": torch.zeros(())}, r"W_dec: expected floats"),
    ):
        foreign(tmp_path, "topk", tensors, k=K)  # type: ignore[arg-type]
        refused(said)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    foreign(tmp_path, "jumprelu")
    refused("it has no threshold")
    foreign(tmp_path, "batchtopk", {"topk_threshold": torch.zeros(1)})
    refused(r"topk_threshold: expected floats \[\], got float32 \[1\]")
    foreign(tmp_path, "topk", k=K)
    save_file({"sparsity": torch.zeros(F + 1)}, tmp_path / "sparsity.safetensors")
    refused(r"sparsity: expected floats \[37\], got float32 \[38\]")
    (tmp_path / "sparsity.safetensors").unlink()
    whole = weights.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 16, pickle.dumps({"W_enc": 1}), b"\x08\0\0\0\0\0\0\0{}      "):
        weights.write_bytes(content)
        refused("sae_weights.safetensors")
    weights.unlink()
    assert not sae_lens.detects(tmp_path)
    refused(r"cannot read .*sae_weights\.safetensors: there is no such file\.")
    weights.write_bytes(whole)
    good = config.read_text("utf-8")
    nested = '{"metadata": ' * 100_000
    for text in ("", "[]", "[1]", "3", "null", '"x"', good[:-1], "{}", nested, '{"k": 1, "k": 2}'):
        config.write_text(text)
        refused(r"cfg\.json")
    config.write_bytes(b"\xff\xfe\x00")
    refused(r"cfg\.json")
    config.unlink()
    refused(r"cannot read .*cfg\.json: there is no such file")


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

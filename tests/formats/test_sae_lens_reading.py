from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashsae.errors import CheckpointError, FlashSAEWarning
from flashsae.formats import sae_lens
from flashsae.sae.saved import sae_of
from helpers.contents import random_content
from helpers.sae_lens_files import D, F, K, check_equal, check_read, foreign, written


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_decoder_norms_are_folded_where_selection_goes_by_them(architecture: str, tmp_path: Path) -> None:
    foreign(tmp_path, architecture, k=K, rescale_acts_by_decoder_norm=True)
    content = check_read(tmp_path)
    torch.testing.assert_close(content.tensors["W_dec"].norm(dim=1), torch.ones(F))
    w = load_file(tmp_path / "sae_weights.safetensors")
    norms = w["W_dec"].double().norm(dim=1)
    once = {"W_enc_T": w["W_enc"].T.double() * norms[:, None], "b_enc": w["b_enc"].double() * norms}
    assert all(torch.equal(content.tensors[name], exact.float()) for name, exact in once.items())  # rounded once
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
    assert written(tmp_path / "again", content)[0]["normalize_activations"] == "expected_average_only_in"
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
    assert written(tmp_path / "again", content)[0]["reshape_activations"] == "hook_z"
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

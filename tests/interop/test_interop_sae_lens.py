"""SAELens loads what we write, and we read what it writes; both give the same numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

import flashsae
from flashsae.formats.content import Content
from flashsae.sae.saved import content_of, sae_of
from flashsae.testing import assert_as_accurate
from helpers.contents import random_content

D, F, K = 7, 37, 5
TOKENS = 64
WRITTEN = {
    "topk": {"k": K},
    "hierarchical_topk": {"k": K},
    "matryoshka:topk": {"k": K},
    "abs_topk": {"k": K},
    "batch_topk": {"k": K},
    "matryoshka": {"k": K},
    "jump_relu": {"target_l0": 4.0},
    "relu": {},
    "gated": {},
    "transcoder:relu": {},
    "transcoder:jump_relu": {"target_l0": 4.0},
    "transcoder:batch_topk": {"k": K},
    "skip_transcoder:relu": {},
    "skip_transcoder:jump_relu": {"target_l0": 4.0},
}
HELD = ("topk", "abstopk", "jumprelu", "standard", "gated")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TRAINED = {
    "topk": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": 4.5, "rescale_acts_by_decoder_norm": True},
    "matryoshka_batchtopk": {"k": 4.0, "matryoshka_widths": [9, 20, F]},
    "jumprelu": {"jumprelu_init_threshold": 0.05},
    "standard": {},
    "gated": {},
}


def with_b_dec(architectures: Iterable[str]) -> list[tuple[str, bool]]:
    """Return each with and without b_dec subtracted from tokens; transcoders, which subtract none, without."""
    both = [(name, applied) for name in architectures for applied in (True, False)]
    return [(name, applied) for name, applied in both if not (applied and "transcoder" in name)]


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loaded_there(folder: Path) -> Any:
    """Load an SAE with the call that SAELens documents; it warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sae_lens.SAE.load_from_disk(str(folder))


@torch.no_grad()
def check_equal(ours: flashsae.SAE, theirs: Any, x: Tensor) -> None:
    """Check that codes, and reconstructions from them, are as close to those of SAELens in float64 as its own are."""
    exact = copy.deepcopy(theirs).to(dtype=torch.float64)
    code = ours.encode(x)
    there = theirs.encode(x)
    assert_as_accurate(code.to_dense().to(there.dtype), there, exact.encode(x.double()), "code")
    assert_as_accurate(ours(x).to(there.dtype), theirs(x), exact(x.double()), "reconstruction")
    if ours.config.normalize_activations == "none":
        of_code = code.to_dense()
        decoded = theirs.decode(of_code.to(there.dtype))
        assert_as_accurate(ours.decode(code).to(there.dtype), decoded, exact.decode(of_code.double()), "decoded")


def an_sae(architecture: str, d_in: int = D, d_sae: int = F, **changes: Any) -> Content:
    content = random_content(
        architecture, d_in, d_sae, metadata={"model": "gpt2", "hookpoint": "h.6"}, **WRITTEN[architecture]
    )
    return replace(content, **changes)


@pytest.mark.parametrize(("architecture", "apply_b_dec"), with_b_dec(WRITTEN))
def test_saelens_loads_what_we_write_and_gets_the_same_numbers(
    architecture: str, apply_b_dec: bool, tmp_path: Path
) -> None:
    is_transcoder = "transcoder" in architecture
    ours = sae_of(an_sae(architecture, apply_b_dec_to_input=apply_b_dec))
    assert ours.save(tmp_path / "sae", format="saelens", metadata={"model": "gpt2", "hookpoint": "h.6"}) == []
    theirs = loaded_there(tmp_path / "sae")
    check_equal(ours, theirs, tokens(TOKENS, D))
    check_equal(ours, theirs, tokens(2, 3, D))
    check_equal(flashsae.load(tmp_path / "sae"), theirs, tokens(TOKENS, D, seed=2))
    assert theirs.cfg.metadata.hook_name == ("blocks.6.hook_resid_pre" if is_transcoder else "blocks.6.hook_resid_post")


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k"), [(7, 37, 1), (7, 37, 37), (1, 3, 2), (64, 5, 5), (33, 129, 16), (2, 1, 1)]
)
def test_sizes_of_any_kind(d_in: int, d_sae: int, k: int, tmp_path: Path) -> None:
    for number, architecture in enumerate(("topk", "abs_topk", "batch_topk", "relu")):
        settings = {"k": k} if "topk" in architecture else {}
        ours = sae_of(random_content(architecture, d_in, d_sae, **settings))
        ours.save(tmp_path / str(number), format="saelens")
        check_equal(ours, loaded_there(tmp_path / str(number)), tokens(TOKENS, d_in))


@torch.no_grad()
def test_ties_and_tokens_of_zeros(tmp_path: Path) -> None:
    for number, architecture in enumerate(("topk", "abs_topk", "batch_topk", "jump_relu", "gated")):
        content = an_sae(architecture)
        content.tensors["W_enc_T"][F // 2 :] = content.tensors["W_enc_T"][: F - F // 2].clone()
        content.tensors["b_enc"].zero_()
        ours = sae_of(content)
        ours.save(tmp_path / str(number), format="saelens")
        theirs = loaded_there(tmp_path / str(number))
        x = tokens(TOKENS, D)
        x[::3] = 0
        x[::7] = content.tensors["b_dec"]  # all pre-activations are 0
        here, there = ours.encode(x).to_dense(), theirs.encode(x)
        torch.testing.assert_close(here.sort(dim=1).values, there.sort(dim=1).values)  # which of equal ones is free
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(here))


@pytest.mark.parametrize("kind", ["layer_norm", "token_norm"])
@pytest.mark.parametrize("architecture", ["topk", "jump_relu", "relu", "gated"])
def test_tokens_are_normalised_alike(kind: str, architecture: str, tmp_path: Path) -> None:
    ours = sae_of(an_sae(architecture, normalize_activations=kind))
    ours.save(tmp_path / "sae", format="saelens")
    theirs = loaded_there(tmp_path / "sae")
    for scale in (1e-2, 1.0, 30.0):
        check_equal(ours, theirs, tokens(TOKENS, D) * scale + 2 * scale)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for number, architecture in enumerate(("relu", "jump_relu", "gated", "topk")):
        content = random_content(architecture, D, F, dtype=dtype, **WRITTEN[architecture])
        sae_of(content).save(tmp_path / str(number), format="saelens")
        theirs = loaded_there(tmp_path / str(number))
        assert {parameter.dtype for parameter in theirs.parameters()} == {dtype}
        assert torch.equal(theirs.W_enc, content.tensors["W_enc_T"].T)
        assert torch.equal(theirs.W_dec, content.tensors["W_dec"])
        x = tokens(TOKENS, D, dtype=dtype)
        if architecture == "relu":
            check_equal(sae_of(content), theirs, x)
        theirs.save_model(tmp_path / f"{number} again")
        again = content_of(flashsae.load(tmp_path / f"{number} again"))
        for name in ("W_enc_T", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(again.tensors[name], content.tensors[name])


def made_there(architecture: str, **config: Any) -> Any:
    kind, settings = get_sae_class(architecture)
    if "transcoder" in architecture:
        config["d_out"] = D + 2
    sae = kind(settings(d_in=D, d_sae=F, **config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    return sae


@pytest.mark.parametrize(("architecture", "apply_b_dec"), with_b_dec((*HELD, *TRANSCODERS)))
def test_we_load_what_saelens_writes_and_get_the_same_numbers(
    architecture: str, apply_b_dec: bool, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"k": K} if "topk" in architecture else {}
    theirs = made_there(architecture, apply_b_dec_to_input=apply_b_dec, **config)
    theirs.save_model(tmp_path / "theirs")
    ours = flashsae.load(tmp_path / "theirs")
    check_equal(ours, theirs, tokens(TOKENS, D))
    assert ours.config.apply_b_dec_to_input is apply_b_dec
    ours.save(tmp_path / "again", format="saelens")
    before, after = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("theirs", "again"))
    if "threshold" in before:
        before["threshold"] = before["threshold"].clamp_min(0)  # there is a ReLU before it
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_selection_by_decoder_norms_and_normalised_tokens_of_theirs(
    architecture: str, normalization: str, tmp_path: Path
) -> None:
    theirs = made_there(architecture, k=K, rescale_acts_by_decoder_norm=True, normalize_activations=normalization)
    theirs.save_model(tmp_path)
    check_equal(flashsae.load(tmp_path), theirs, tokens(TOKENS, D) * 3 + 1)


@pytest.mark.parametrize("architecture", TRAINED)
def test_trainings_of_theirs_are_read_ended_and_not_ended(architecture: str, tmp_path: Path) -> None:
    kind, settings = get_sae_training_class(architecture)
    training = kind(settings(d_in=D, d_sae=F, **TRAINED[architecture]))
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-2)
    for step in range(12):
        batch = TrainStepInput(
            tokens(128, D, seed=step), dict.fromkeys(training.get_coefficients(), 1e-3), None, step, False
        )
        optimizer.zero_grad()
        training.training_forward_pass(batch).loss.backward()
        optimizer.step()
    training.save_inference_model(tmp_path / "ended")
    training.save_model(tmp_path / "not ended")
    theirs = loaded_there(tmp_path / "ended")
    for name in ("ended", "not ended"):
        ours = flashsae.load(tmp_path / name)
        check_equal(ours, theirs, tokens(TOKENS, D))
        batched = {"batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}
        assert ours.architecture.name == batched.get(architecture, ours.architecture.name)
    if architecture == "matryoshka_batchtopk":
        assert ours.config.arch.prefixes == (9.0, 20.0, float(F))


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka", "jump_relu", "relu", "gated", "abs_topk"])
@pytest.mark.parametrize("normalization", ["power_of_two", "layer_norm"])
def test_what_we_train_is_loaded_there(arch: str, normalization: str, tmp_path: Path) -> None:
    x = tokens(2048, D) @ tokens(D, D, seed=9) * 5 + 3
    settings = {"target_l0": 4.0} if arch == "jump_relu" else {"k": 4} if "topk" in arch or arch == "matryoshka" else {}
    sae = flashsae.fit(
        x, arch=arch, d_sae=F, tokens=8192, batch_tokens=256, normalize_activations=normalization, **settings
    )
    sae = sae.eval()
    sae.save(tmp_path / "sae", format="saelens", extras={"latent_density": torch.rand(F)})
    theirs = loaded_there(tmp_path / "sae")
    check_equal(sae, theirs, x[:TOKENS])
    assert theirs.cfg.metadata.training_architecture
    back = flashsae.load(tmp_path / "sae")
    assert back.config == sae.config
    here, there = sae.state_dict(), back.state_dict()
    assert all(torch.equal(here[row.name], there[row.name]) for row in sae.architecture.parameters if row.saved)


@pytest.mark.parametrize("architecture", ["topk", "abs_topk", "batch_topk", "jump_relu", "relu", "gated"])
def test_saelens_goes_on_training_ours(architecture: str, tmp_path: Path) -> None:
    ours = sae_of(an_sae(architecture))
    ours.save(tmp_path / "sae", format="saelens")
    training = TrainingSAE.load_from_disk(tmp_path / "sae")
    check_equal(ours, training, tokens(TOKENS, D))
    batch = TrainStepInput(tokens(TOKENS, D), dict.fromkeys(training.get_coefficients(), 1e-3), None, 0, False)
    assert training.training_forward_pass(batch).loss.isfinite()


def test_from_pretrained_takes_ours_with_its_densities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    density = torch.rand(F)
    ours = sae_of(an_sae("batch_topk"))
    ours.save(tmp_path / "sae", format="saelens", extras={"latent_density": density}, metadata={"model": "gpt2"})
    where = "sae_lens.loading.pretrained_sae_loaders.hf_hub_download"
    monkeypatch.setattr(where, lambda repo_id, filename, force_download: str(tmp_path / filename))
    theirs, config, sparsity = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity("somebody/ours", "sae")
    check_equal(ours, theirs, tokens(TOKENS, D))
    assert config["metadata"]["flashsae"]["architecture"] == "batch_topk"
    torch.testing.assert_close(10**sparsity, density)

"""What the evaluations of SAEBench ask of an SAE, as they ask it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashsae
from flashsae.architecture import settings_of
from flashsae.errors import CheckpointError, ConfigError
from flashsae.sae_bench import BenchSAE

D_IN, D_SAE = 12, 40
ARCHS = ("topk", "hierarchical_topk", "abs_topk", "batch_topk", "matryoshka", "jump_relu", "relu", "gated")
PLACE = {"model_name": "gpt2", "hook_name": "blocks.6.hook_resid_post"}


def trained(arch: str, generator: torch.Generator, *, unit: bool = True, **settings: Any) -> flashsae.SAE:
    """Return an SAE with parameters as a training may leave them, in inference."""
    own = {"k": 5} if arch in ("topk", "abs_topk", "batch_topk", "matryoshka") else {}
    own = {"k": 5, "budgets": [2, 5]} if arch == "hierarchical_topk" else own
    own = {"prefixes": [8, 40], **own} if arch == "matryoshka" else own
    sae = flashsae.SAE(flashsae.SAEConfig(D_IN, D_SAE, arch=settings_of(arch, **own), **settings))
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "b_mag", "r_mag"):
            if hasattr(sae, name):
                getattr(sae, name).normal_(std=0.1, generator=generator)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
        if not unit:
            sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1, generator=generator))
    return sae.eval()


def check_evaluations(bench: BenchSAE, x: Tensor) -> None:
    """Do with an SAE what evaluations of SAEBench do; x: [texts, tokens, d_in]."""
    standardize(bench.cfg)
    norms = torch.norm(bench.W_dec.data, dim=1).to(bench.W_dec.dtype)
    halves = bench.dtype in (torch.bfloat16, torch.float16)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-2 if halves else 1e-5)
    for name, shape in {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}.items():
        parameter = getattr(bench, name)
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.shape, parameter.dtype, parameter.device) == (shape, bench.dtype, bench.device)
    assert (bench.W_dec.shape[0], bench.cfg.d_in) == (bench.cfg.d_sae, D_IN)
    # core: codes of texts, masked, and the reconstruction in their place; metrics of weights
    code = bench.encode(x.to(bench.device))
    assert (code.shape, code.dtype) == ((*x.shape[:2], D_SAE), bench.dtype)
    assert bench.encode(x.flatten(0, 1)).equal(code.flatten(0, 1))
    tolerance: dict[str, Any] = {"rtol": 3e-2, "atol": 3e-2} if halves else {}
    torch.testing.assert_close(bench.decode(code), bench(x), **tolerance)
    assert bench(x).dtype == bench.dtype
    assert bool((bench.W_enc / bench.W_enc.norm(dim=0, keepdim=True)).isfinite().all())
    bias = bench.b_mag if bench.cfg.architecture_str == "gated" else bench.b_enc  # type: ignore[attr-defined]
    assert len(bias.cpu().tolist()) == bench.cfg.d_sae
    # sparse probing, SCR and TPP: codes of a few latents changed in place, then decoded
    before = code.clone()
    error = x.to(bench.dtype) - bench.decode(code)
    code[..., [1, 3]] *= 0.0
    assert (bench.decode(code) + error).shape == x.shape
    # RAVEL: a trained mask over codes
    mask = torch.zeros(D_SAE, requires_grad=True)
    bench.decode((mask.sigmoid() * before[0]).to(bench.dtype)).sum().backward()
    assert mask.grad is not None
    assert all(parameter.grad is None for parameter in bench.parameters())
    # results are written with all of the configuration
    assert json.loads(json.dumps(bench.cfg.to_dict())) == json.loads(json.dumps(asdict(bench.cfg)))
    assert "metadata" not in bench.cfg.to_dict()


def standardize(cfg: Any) -> None:
    """Set what SAEBench sets on a configuration; it needs three of the fields."""
    assert None not in (cfg.hook_name, cfg.hook_layer, cfg.model_name)
    for name in ("context_size", "dataset_trust_remote_code", "hook_head_index", "prepend_bos", "seqpos_slice"):
        getattr(cfg, name)
    cfg.exclude_special_tokens, cfg.architecture_str = None, cfg.architecture
    cfg.metadata = SimpleNamespace(hook_name=cfg.hook_name, **cfg.model_from_pretrained_kwargs)
    assert cfg.normalize_activations == "none"
    assert getattr(torch, cfg.dtype).is_floating_point


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_evaluations_get_what_they_ask_for(arch: str, unit: bool, generator: torch.Generator) -> None:
    sae = trained(arch, generator, unit=unit)
    x = torch.randn(3, 7, D_IN, generator=generator)
    expected, reconstructed = sae.encode(x).to_dense(), sae(x)
    bench = flashsae.saebench(sae, **PLACE)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(bench.encode(x), expected * norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bench(x), reconstructed)
    torch.testing.assert_close(bench.decode(bench.encode(x)), reconstructed)
    torch.testing.assert_close(bench.W_enc, sae.W_enc_T.T * norms)
    assert bool(((bench.encode(x) != 0) == (expected != 0)).all())  # no norm changes what is selected
    check_evaluations(bench, x)
    moved = bench.to(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert moved is bench
    assert (bench.dtype, bench.cfg.dtype, bench.W_enc.dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    check_evaluations(bench, x.bfloat16())
    assert sae.W_dec.dtype == torch.float32
    assert sae.W_dec.requires_grad
    torch.testing.assert_close(sae(x), reconstructed, rtol=0, atol=0)  # the one that was given is as it was


def test_parameters_are_shared_where_rows_have_norm_1(generator: torch.Generator) -> None:
    sae = trained("topk", generator)
    bench = flashsae.saebench(sae, **PLACE)
    for name, own in {"W_enc": sae.W_enc_T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}.items():
        assert getattr(bench, name).data_ptr() == own.data_ptr(), name
    assert len(list(bench.parameters())) == 4
    assert not bench.training
    bench.turn_off_forward_pass_hook_z_reshaping()  # as evaluations at hook_z do
    assert not bench.hook_z_reshaping_mode
    bench.turn_on_forward_pass_hook_z_reshaping()


def test_a_row_of_zeros_is_a_direction_that_is_never_active(generator: torch.Generator) -> None:
    sae = trained("topk", generator)
    with torch.no_grad():
        sae.W_dec[3] = 0.0
        sae.b_enc[3] = 50.0
    bench, x = flashsae.saebench(sae, **PLACE), torch.randn(1, 9, D_IN, generator=generator)
    assert bool((bench.encode(x)[..., 3] == 0).all())
    torch.testing.assert_close(bench.decode(bench.encode(x)), sae(x))
    check_evaluations(bench, x)


def test_an_sae_in_training_is_read_as_in_inference(generator: torch.Generator) -> None:
    x = torch.randn(1, 30, D_IN, generator=generator) + 4.0
    sae = flashsae.SAE(flashsae.SAEConfig(D_IN, D_SAE, arch=settings_of("batch_topk", k=3)))
    sae.initialize_from(x[0])
    with torch.no_grad():
        sae.threshold.fill_(0.2)
    bench = flashsae.saebench(sae, **PLACE)
    assert sae.training
    expected = sae.eval().encode(x).to_dense()
    torch.testing.assert_close(bench.encode(x), expected)


def test_what_a_file_knows_stands_in_the_configuration(tmp_path: Path, generator: torch.Generator) -> None:
    metadata = {
        "model": "openai-community/gpt2", "hookpoint": "h.6.mlp", "context_length": 64, "prepend_bos": False,
        "dataset": "some/text",
    }  # fmt: skip
    trained("jump_relu", generator).save(tmp_path / "sae", metadata=metadata)
    cfg = flashsae.saebench(tmp_path / "sae").cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gpt2", "blocks.6.hook_mlp_out", 6)
    assert (cfg.context_size, cfg.prepend_bos, cfg.dataset_path) == (64, False, "some/text")
    assert (cfg.architecture, cfg.d_in, cfg.d_sae, cfg.dtype) == ("jumprelu", D_IN, D_SAE, "float32")
    cfg = flashsae.saebench(
        str(tmp_path / "sae"), model_name="gpt2-small", hook_name="blocks.2.attn.hook_z", hook_layer=3, context_size=9,
        device="cpu",
    ).cfg  # fmt: skip
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer, cfg.context_size) == (
        "gpt2-small", "blocks.2.attn.hook_z", 3, 9,
    )  # fmt: skip


NAMES = {
    "topk": "topk", "hierarchical_topk": "topk", "batch_topk": "batch_topk", "matryoshka": "matryoshka_batch_topk",
    "jump_relu": "jumprelu", "relu": "standard", "gated": "gated", "abs_topk": "abstopk",
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures_have_the_names_that_its_tables_have(arch: str, generator: torch.Generator) -> None:
    assert flashsae.saebench(trained(arch, generator), **PLACE).cfg.architecture == NAMES[arch]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "model_name: nothing tells which model this SAE is of: give its name in transformer-lens."),
        ({"model_name": "gpt2"}, "hook_name: nothing tells what this SAE reads: give its name in transformer-lens"),
        ({"model_name": "gpt2", "hook_name": "hook_embed"}, "hook_layer: hook_embed tells no layer: give the number"),
    ],
)
def test_what_nothing_tells_is_asked_for(given: dict[str, Any], sentence: str, generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        flashsae.saebench(trained("topk", generator), **given)


def test_what_it_cannot_evaluate_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=r"^SAEBench puts a reconstruction in the place of what was read, and"):
        flashsae.saebench(trained("transcoder", generator), **PLACE)
    for norm in ("layer_norm", "token_norm"):
        with pytest.raises(ConfigError, match=f"^SAEBench decodes codes without the tokens, .*'{norm}' cannot be"):
            flashsae.saebench(trained("topk", generator, normalize_activations=norm), **PLACE)
    with pytest.raises(ConfigError, match=r"^sae: expected an SAE or the place of one, got int"):
        flashsae.saebench(3, **PLACE)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no SAE"):
        flashsae.saebench(tmp_path / "none", **PLACE)
    trained("topk", generator).save(tmp_path / "sae", metadata={"model": "gpt2", "hookpoint": "h.6.unheard"})
    with pytest.raises(ConfigError, match=r"^hook_name: transformer-lens has no name for h\.6\.unheard of gpt2"):
        flashsae.saebench(tmp_path / "sae")

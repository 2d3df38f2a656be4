from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.architecture import architecture_named, architecture_names, architecture_of
from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.documents import sealed
from flashsae.train.state import INIT_TOKENS

SUBTRACTING = [name for name in architecture_names(installed=False) if architecture_named(name).subtracts_b_dec]


def sizes_of(name: str) -> dict[str, int]:
    return {each: 4 for each in ("k", "target_l0") if each in architecture_named(name).settings.__dataclass_fields__}


def config_of(name: str, *, applied: bool | None = None) -> SAEConfig:
    arch = architecture_named(name).settings(**sizes_of(name))
    return SAEConfig(12, 20, arch=arch, apply_b_dec_to_input=applied)


def small(name: str, *, applied: bool | None = None) -> SAE:
    sae = SAE(config_of(name, applied=applied), dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(2)
    for row in sae.architecture.parameters:
        if row.saved and row.shape and row.name != "W_dec":
            value = getattr(sae, row.name)
            value.data.copy_(torch.randn(value.shape, generator=generator).abs() * 0.3)
    return sae


def without_b_dec(sae: SAE) -> SAE:
    """Return the SAE of the same architecture as ever whose encoder is made to see x + b_dec."""
    other = SAE(replace(sae.config, apply_b_dec_to_input=True), seed=None, dtype=torch.float64)
    other.load_state_dict({row.name: sae.state_dict()[row.name] for row in other.architecture.parameters})
    return other.eval()


@pytest.mark.parametrize("name", SUBTRACTING)
def test_the_encoder_sees_x_as_it_comes(name: str, generator: torch.Generator) -> None:
    sae = small(name, applied=False)
    x = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    code = without_b_dec(sae).encode(x + sae.b_dec)
    torch.testing.assert_close(sae.encode(x).to_dense(), code.to_dense())
    assert (sae.encode(x).to_dense() - without_b_dec(sae).encode(x).to_dense()).abs().max() > 0.01
    assert sae.b_pre is None
    torch.testing.assert_close(sae(x), code.to_dense() @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("name", SUBTRACTING)
def test_it_is_saved_and_rescaled_as_it_is(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    sae = small(name, applied=False)
    x = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    sae.save(tmp_path / "sae")
    for loaded in (SAE.load(tmp_path / "sae"), flashsae.load(tmp_path / "sae"), pickle.loads(pickle.dumps(sae))):
        assert loaded.config == sae.config
        assert loaded.architecture is sae.architecture
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in sae.state_dict().items())
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-12, atol=1e-12)
    content = json.loads((tmp_path / "sae" / "flashsae.json").read_text())
    assert (content["apply_b_dec_to_input"], content["format_version"]) == (False, 2)
    assert torch.equal(sae.rescaled(4.0)(x), sae(4 * x) / 4)
    assert torch.equal(sae.rescaled(4.0, 2.0)(x), sae(4 * x) / 2)
    assert sae.rescaled(4.0).config == sae.config
    assert copy.deepcopy(sae).architecture is sae.architecture


def test_what_is_as_the_architecture_has_it_is_not_told() -> None:
    usual = config_of("topk")
    assert usual == config_of("topk", applied=True) != config_of("topk", applied=False)
    assert "apply_b_dec" not in repr(usual) + repr(SAE(usual))
    assert usual.apply_b_dec_to_input is True
    other = config_of("topk", applied=False)
    assert repr(other).endswith("apply_b_dec_to_input=False)")
    assert "apply_b_dec_to_input=False" in repr(SAE(other))
    assert replace(other, normalize_activations="layer_norm").apply_b_dec_to_input is False
    assert other.architecture is config_of("topk", applied=False).architecture is not architecture_of(other.arch)
    assert config_of("transcoder").apply_b_dec_to_input is False
    assert config_of("transcoder", applied=False).architecture is architecture_named("transcoder")


def test_a_b_dec_for_which_there_is_no_place_is_refused(tmp_path: Path) -> None:
    for make in (
        lambda: config_of("transcoder", applied=True),
        lambda: flashsae.TrainConfig(arch="transcoder", apply_b_dec_to_input=True),
    ):
        with pytest.raises(
            ConfigError, match=r"^apply_b_dec_to_input: TopK transcoder subtracts no b_dec from what it encodes: leave"
        ):
            make()
    with pytest.raises(ConfigError, match=r"^apply_b_dec_to_input: expected true or false, got 'no'"):
        SAEConfig(3, 5, 2, apply_b_dec_to_input="no")  # type: ignore[arg-type]
    SAE(config_of("transcoder")).save(tmp_path / "sae")
    path = tmp_path / "sae" / "flashsae.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "apply_b_dec_to_input": True})))
    with pytest.raises(
        CheckpointError, match="sae cannot be read here: apply_b_dec_to_input: TopK transcoder subtracts"
    ):
        SAE.load(tmp_path / "sae")


def test_one_unit_of_b_dec_is_not_two_where_it_is_subtracted() -> None:
    with pytest.raises(ConfigError, match=r"^factor_out: expected that of the input, 2, where b_dec is subtracted"):
        SAE(SAEConfig(12, 20, 3)).rescaled(2.0, 4.0)
    with pytest.raises(ConfigError, match=r"^factor_out: expected that of the input, where b_dec is subtracted"):
        SAE(SAEConfig(12, 20, 3)).rescaled(torch.arange(1.0, 13), 2.0)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(1200, 12, generator=generator) + 3.0


SHORT = {"tokens": 1200, "batch_tokens": 100, "d_sae": 20, "progress": False}


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jump_relu", "gated"])
def test_it_is_trained_as_it_is_and_sees_the_mean_of_x_meanwhile(name: str, x: Tensor, tmp_path: Path) -> None:
    own = sizes_of(name)
    sae = flashsae.fit(x, arch=name, apply_b_dec_to_input=False, run=tmp_path / "run", **own, **SHORT)
    assert sae.config.apply_b_dec_to_input is False
    assert sae.b_pre is None
    assert not sae.x_mean.any()
    usual = flashsae.fit(x, arch=name, **own, **SHORT)
    assert flashsae.evaluate(sae, x).fvu < 1.1 * flashsae.evaluate(usual, x).fvu + 0.02
    read = flashsae.load_checkpoint(tmp_path / "run")
    assert read.config == sae.config
    assert torch.equal(read.W_enc_T, sae.W_enc_T)
    assert torch.equal(read.b_enc, sae.b_enc)


def test_a_training_that_goes_on_from_it_keeps_it(x: Tensor, tmp_path: Path) -> None:
    start = flashsae.fit(x, k=4, apply_b_dec_to_input=False, **SHORT)
    start.save(tmp_path / "start")
    for init_from in (start, tmp_path / "start"):
        tuned = flashsae.fit(x, init_from=init_from, lr=1e-12, tokens=100, batch_tokens=100, progress=False)
        assert tuned.config == start.config
        torch.testing.assert_close(tuned(x), start(x), rtol=1e-4, atol=1e-4)
    assert len(x) <= INIT_TOKENS
    other = flashsae.fit(x, init_from=start, arch="batch_topk", tokens=100, batch_tokens=100, progress=False)
    assert (other.config.architecture.name, other.config.apply_b_dec_to_input) == ("batch_topk", False)
    with pytest.raises(ConfigError, match=r"init_from: expected .* with no b_dec that is subtracted from its input"):
        flashsae.fit(x, init_from=start, apply_b_dec_to_input=True, tokens=100, batch_tokens=100, progress=False)
    usual = flashsae.fit(x, k=4, **SHORT)
    with pytest.raises(ConfigError, match=r"init_from: expected .* with a b_dec that is subtracted from its input"):
        flashsae.fit(x, init_from=usual, apply_b_dec_to_input=False, tokens=100, batch_tokens=100, progress=False)


def test_layer_norm_and_token_norm_go_with_it(x: Tensor) -> None:
    for kind in ("layer_norm", "token_norm"):
        sae = flashsae.fit(x, k=4, apply_b_dec_to_input=False, normalize_activations=kind, **SHORT)
        assert (sae.config.apply_b_dec_to_input, sae.config.normalize_activations) == (False, kind)
        assert flashsae.evaluate(sae, x).fvu < 1

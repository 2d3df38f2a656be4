from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.errors import CheckpointError, ConfigError


@pytest.fixture
def sae() -> SAE:
    return SAE(SAEConfig(3, 5, 2), seed=0)


def run_of_several(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        SAE(SAEConfig(3, 5, 2), seed=number).save(folder / name / "sae")
    return folder


def test_a_folder_of_ours_and_the_run_that_made_it_are_read(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "run" / "sae")
    for place in (tmp_path / "run" / "sae", str(tmp_path / "run")):
        loaded = flashsae.load(place)
        assert torch.equal(loaded.W_dec, sae.W_dec)
        assert (loaded.config, loaded.training) == (sae.config, False)
    assert flashsae.load(tmp_path / "run", format="flashsae").config == sae.config


def test_one_of_several_is_named_behind_their_folder(tmp_path: Path) -> None:
    run = run_of_several(tmp_path / "run", "layers.3", "layers.6")
    with pytest.raises(
        CheckpointError, match=r"run holds 2 SAEs: layers.3, layers.6\. Name one of them, such as .*run/layers.3\."
    ):
        flashsae.load(run)
    assert torch.equal(flashsae.load(run / "layers.6").W_dec, SAE(SAEConfig(3, 5, 2), seed=1).W_dec)
    with pytest.raises(CheckpointError, match=r"layers.9 holds no SAE: .* run holds layers.3, layers.6\.|holds layers"):
        flashsae.load(run / "layers.9")
    with pytest.raises(CheckpointError, match=r"holds no SAE: there is no such file or folder\.$"):
        flashsae.load(tmp_path / "nothing" / "here")


def test_a_run_that_was_killed_before_its_first_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("k = 3\n")
    with pytest.raises(
        CheckpointError, match=r"^\S+ holds no SAE: it is of a run that has not ended; flashsae train -"
    ):
        flashsae.load(tmp_path)
    flashsae.SAE(flashsae.SAEConfig(3, 5, 2)).save(tmp_path / "h.3" / "sae")
    assert flashsae.load(tmp_path).config.d_sae == 5


def test_a_training_that_has_not_ended_is_told_what_reads_it(tmp_path: Path) -> None:
    x = torch.randn(600, 4)
    flashsae.fit(x, d_sae=8, k=2, tokens=600, batch_tokens=200, run=tmp_path / "run", progress=False)
    step = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match=r"is a checkpoint of a training: flashsae.load_checkpoint reads it"):
        flashsae.load(step)
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(
            CheckpointError, match=r"checkpoints of a training and no SAE: flashsae.load_checkpoint reads"
        ):
            flashsae.load(place)


def test_what_is_of_the_hub_alone_is_refused_beside_a_folder(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    with pytest.raises(ConfigError, match=r"^revision: expected nothing beside a place on this machine"):
        flashsae.load(tmp_path / "sae", revision="main")
    with pytest.raises(ConfigError, match=r"^token: expected nothing beside a place on this machine"):
        flashsae.load(tmp_path / "sae", token="hf_x")
    with pytest.raises(ConfigError, match=r"^format: expected one of"):
        flashsae.load(tmp_path / "sae", format="theirs")
    with pytest.raises(ConfigError, match=r"^place: expected a path"):
        flashsae.load(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device that exists, got 'cuda:77'"):
        flashsae.load(tmp_path / "sae", device="cuda:77")


def test_the_format_that_is_named_is_the_one_that_is_read(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "run" / "sae")
    other = SAE(SAEConfig(3, 5, 2), seed=1)
    other.save(tmp_path / "run" / "saelens", format="saelens", metadata={"model": "gpt2", "hookpoint": "h.3"})
    assert torch.equal(flashsae.load(tmp_path / "run").W_dec, sae.W_dec)
    assert torch.equal(flashsae.load(tmp_path / "run" / "saelens", format="saelens").W_dec, other.W_dec)
    with pytest.raises(CheckpointError):
        flashsae.load(tmp_path / "run" / "saelens", format="sparsify")
    with pytest.raises(
        CheckpointError, match=r"holds no FlashSAE SAE: expected flashsae.json in it, found cfg.json, sae"
    ):
        flashsae.load(tmp_path / "run" / "saelens", format="flashsae")


def test_what_a_kill_left_of_a_folder_that_was_replaced_is_put_back(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "sae")
    (tmp_path / "sae").rename(tmp_path / ".sae.0123.old")
    assert torch.equal(flashsae.load(tmp_path / "sae").W_dec, sae.W_dec)

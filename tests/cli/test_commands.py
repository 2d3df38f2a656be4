"""How activations are scaled and what a training starts from, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae import SAE
from flashsae.settings.run import RunConfig
from flashsae.train.checkpoint import list_checkpoints
from helpers.command_line import run_main

FEW = ("--tokens", "512", "--batch-tokens", "64", "--no-report", "--checkpoint-every-steps", "5")
SIZES = (*FEW, "--d-sae", "64", "--k", "4")


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two hookpoints."""
    folder = tmp_path_factory.mktemp("cache")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Paragraph number {i} says that the cat sat on mat {i}." for i in range(60)))
    run_main("cache", "minilm", text, "--hookpoint", "encoder.layer.[01]", "--out", folder / "acts")
    return folder / "acts"


def _train(acts: Path, run: Path, *more: str | Path, hookpoint: str = "encoder.layer.0") -> None:
    assert run_main("train", "--activations", acts, "--hookpoint", hookpoint, "--run", run, *more) == 0


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return SAE.load(run / "sae").state_dict()


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["none", "mean_square", "layer_norm"])
@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_scaled_run_is_measured_and_resumed(arch: str, kind: str, acts: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", ("--arch", arch, "--normalize-activations", kind, "--init", "data")
    _train(acts, run, *SIZES, *more)
    whole = _weights(run)
    settings = RunConfig.from_toml(run / "config.toml").train
    assert (settings.normalize_activations, settings.init) == (kind, "data")
    description = json.loads((run / "sae" / "flashsae.json").read_text())
    assert description.get("normalize_activations", "none") == ("layer_norm" if kind == "layer_norm" else "none")
    assert description["format_version"] == (3 if kind == "layer_norm" else 2)
    fvu = json.loads((run / "evaluation.json").read_text())["fvu"]
    assert fvu < 1.1  # of activations as they come
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    shutil.rmtree(run / "sae")
    assert run_main("train", "--resume", run) == 0
    assert _same(_weights(run), whole)


def test_a_run_goes_on_from_a_saved_sae_with_its_settings(
    acts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _train(acts, first, *SIZES, "--arch", "batch_topk", "--normalize-activations", "layer_norm")
    capsys.readouterr()
    _train(acts, second, *FEW, "--init-from", first)  # what is not given is as it was there
    assert f"start from the SAE in {first}".replace(" ", "") in "".join(capsys.readouterr().out.split())
    assert SAE.load(second / "sae").config == SAE.load(first / "sae").config
    whole = _weights(second)
    shutil.rmtree(list_checkpoints(second / "checkpoints")[-1])
    shutil.rmtree(second / "sae")
    shutil.rmtree(first)
    assert run_main("train", "--resume", second) == 0
    assert _same(_weights(second), whole)
    third: tuple[str | Path, ...] = ("train", "--activations", acts, "--run", tmp_path / "third", *FEW)
    for more, message in (
        (("--d-sae", "32"), "init_from: expected an SAE like the one that is asked for, BatchTopK"),
        (("--normalize-activations", "none"), "with normalize_activations layer_norm"),
        (("--init", "data"), "init: expected no other start beside init_from"),
        ((), "holds no SAE: there is no such file or folder"),
    ):
        capsys.readouterr()
        assert run_main(*third, *more, "--init-from", second if more else tmp_path / "none", "--plan") != 0
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_each_of_several_hookpoints_goes_on_from_its_own(acts: Path, tmp_path: Path) -> None:
    every: dict[str, Any] = {"hookpoint": "encoder.layer.*"}
    _train(acts, tmp_path / "first", *SIZES, **every)
    _train(acts, tmp_path / "second", *SIZES, "--lr", "1e-9", "--init-from", tmp_path / "first", **every)
    for hookpoint in ("encoder.layer.0", "encoder.layer.1"):
        before, after = (_weights(tmp_path / name / hookpoint) for name in ("first", "second"))
        torch.testing.assert_close(before["W_dec"], after["W_dec"], rtol=0, atol=1e-6)


def test_the_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "--help") == 0
    shown = capsys.readouterr().out
    for words in ("--normalize-activations", "power_of_two", "mean_square", "layer_norm", "--init-from", "--init"):
        assert words in shown


def test_a_stop_before_the_training_says_that_the_same_command_goes_on(
    acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(folder: Path, console: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsae.run.execute.execute", stopped)
    run, hookpoint = tmp_path / "run", "encoder.layer.0"
    assert run_main("train", "--activations", acts, "--hookpoint", hookpoint, "--run", run, *SIZES) == 130
    assert "\nStopped. The training had not begun; the same command goes on.\n" in capsys.readouterr().out
    assert not run.exists()


def test_a_run_that_has_ended_says_that_nothing_is_left(
    acts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "Nothing is left to train: --extend TOKENS goes on from the end of this run."
    run = tmp_path / "run"
    _train(acts, run, "--tokens", "128", "--batch-tokens", "64", "--no-report", "--d-sae", "16", "--k", "2")
    assert told not in capsys.readouterr().out
    assert run_main("train", "--resume", run) == 0
    assert told in capsys.readouterr().out
    assert run_main("train", "--resume", run, "--extend", "128") == 0
    assert told not in capsys.readouterr().out
    (run / "evaluation.json").unlink()
    assert run_main("train", "--resume", run) == 0
    assert told not in capsys.readouterr().out

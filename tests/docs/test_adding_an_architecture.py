"""The page about a user's own architecture does what it says: its code trains, resumes, saves, loads and reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae.architecture import description
from flashsae.cli import main
from flashsae.data.cache_writer import write_cache
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError
from helpers import tiny_models
from helpers.pages import ROOT, code_blocks

DEFINED, USED, COMMAND = code_blocks(ROOT / "docs" / "adding-an-architecture.md")
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
CONFIG = flashsae.TrainConfig(batch_tokens=64, tokens=64 * 30, checkpoint_every_steps=7, shuffle_tokens=256)
SIZES: dict[str, Any] = {"d_sae": 32, "config": CONFIG, "progress": False}
SMALL: dict[str, Any] = {**SIZES, "arch": "balanced_topk", "k": 3}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Import the file that the page defines, as its reader does; other tests know nothing of it."""
    folder = tmp_path_factory.mktemp("of_a_user")
    (folder / "balanced_topk.py").write_text(DEFINED, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(description, "_REGISTERED", dict(description._REGISTERED))
        patch.syspath_prepend(folder)
        import_module("balanced_topk")
        yield
    del sys.modules["balanced_topk"]


def same(a: flashsae.SAE, b: flashsae.SAE) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def test_it_takes_fewer_than_sixty_lines() -> None:
    assert len(DEFINED.splitlines()) < 60


def test_it_trains_and_its_term_and_its_parameter_are_in_use(tmp_path: Path) -> None:
    sae = flashsae.fit(X, **SMALL, run=tmp_path / "run")
    assert flashsae.evaluate(sae, X).fvu < 0.6
    (first, *_, last) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    assert first["crowding"] < last["crowding"] < 1
    assert torch.equal(sae.key_scale, torch.ones(32))  # folded
    norms = sae.W_dec.norm(dim=1)
    assert norms.max() > 1.01  # a latent that was active often had a handicap
    assert norms.min() > 0.999


def test_folding_changes_no_reconstruction(generator: torch.Generator) -> None:
    import balanced_topk

    settings = balanced_topk.BalancedTopKSettings(k=3)
    sae = flashsae.SAE(flashsae.SAEConfig(8, 32, arch=settings), seed=0, dtype=torch.float64)
    sae.key_scale.copy_(1 - 0.8 * torch.rand(32, generator=generator))
    x = X.double()
    with torch.no_grad():
        before = sae(x)
        balanced_topk.fold(sae)
        torch.testing.assert_close(sae(x), before)
    assert torch.equal(sae.key_scale, torch.ones(32, dtype=torch.float64))


def test_a_handicap_makes_the_frequent_rarer() -> None:
    import balanced_topk

    shares = []
    for handicap in (0.0, 50.0):
        arch = balanced_topk.BalancedTopKSettings(k=3, handicap=handicap)
        sae = flashsae.fit(X + 2, **SIZES, arch=arch)  # a mean that many latents point to
        active = sae.encode(X + 2).to_dense() > 0
        shares.append(active.double().mean(0).max().item())
    assert shares[1] < shares[0]


class Killing:
    """Batches that end the training when so many of them were read."""

    def __init__(self, batches: list[torch.Tensor], left: int) -> None:
        self.batches, self.left = batches, left

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def test_a_killed_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    batches = list(X.split(64))
    whole = flashsae.fit(batches, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        flashsae.fit(Killing(batches, 20), **SMALL, run=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000014").exists()
    resumed = flashsae.fit(batches, **SMALL, run=tmp_path / "run", resume=True)
    assert same(resumed, whole)
    again = flashsae.fit(batches, **SMALL, run=tmp_path / "run", resume=True)  # it is complete
    assert same(again, whole)


def test_the_code_of_the_page_fits_resumes_saves_loads_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert USED.count("d_sae=4096, ") == 2
    known: dict[str, Any] = {"x": X, "x_test": X[:100], "config": CONFIG}
    exec(USED.replace("d_sae=4096, ", "d_sae=64, config=config, "), known)
    assert 0 < float(capsys.readouterr().out) < 1
    saved = json.loads((tmp_path / "my-sae" / "flashsae.json").read_text("utf-8"))
    assert saved["architecture"] == "balanced_topk"
    assert saved["settings"] == {"k": 32, "handicap": 8.0, "crowding_weight": 0.01}
    assert known["sae"].config.arch.handicap == 8.0


def test_where_it_is_not_registered_a_saved_sae_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flashsae.fit(X, **SMALL).save(tmp_path / "sae")
    monkeypatch.delitem(description._REGISTERED, "balanced_topk")
    with pytest.raises(CheckpointError, match=r"balanced_topk.*registered"):
        flashsae.SAE.load(tmp_path / "sae")


@pytest.mark.slow
def test_a_run_on_texts_ends_with_figures_and_a_report_that_explains_its_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts", tiny_models.source(tiny_models.CACHED), shard_rows=tiny_models.SHARD_ROWS)
    assert COMMAND.count("minilm python-docs") == COMMAND.count("--k 32") == COMMAND.count("--d-sae 4096") == 1
    smaller = COMMAND.replace("minilm python-docs", "--activations acts --hookpoint h.0 --batch-tokens 32 --tokens 640")
    with pytest.raises(SystemExit) as end:
        exec(smaller.replace("--k 32", "--k 3").replace("--d-sae 4096", "--d-sae 32"), {})
    assert not end.value.code
    assert "held-out FVU" in capsys.readouterr().out
    run = tmp_path / "runs" / "on-texts"
    evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
    assert evaluation["architecture"] == "balanced_topk"
    page = (run / "report.html").read_text("utf-8")
    for words in ("crowding", "Σ (1 − key_scale) · acts² / Σ acts²", "latents with a handicap", "handicap"):
        assert words in page
    assert flashsae.SAE.load(run / "sae").config.arch.handicap == 8.0


def test_its_help_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--arch", "balanced_topk", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--handicap" in told
    assert "A latent that is chosen for every token" in told

"""What is settled before a run begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashsae import fit, start
from flashsae.errors import ConfigError
from flashsae.run import show_plan
from flashsae.settings import ActivationsConfig, RunConfig
from flashsae.train import TrainConfig


def test_runs_are_named_after_model_and_hookpoint_and_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def place(**activations: str) -> str:
        return str(start.place_of(RunConfig(ActivationsConfig(**activations))))  # type: ignore[arg-type]

    assert place() == "runs/minilm-encoder.layer.2"
    assert place(model="owner/name", hookpoint="layers.*") == "runs/name-layers.all"
    assert place(model="~/models/m", hookpoint="h.[0-3]") == "runs/m-h.-0-3-"
    assert start.new_run(RunConfig()) == Path("runs/minilm-encoder.layer.2")
    assert place() == "runs/minilm-encoder.layer.2-2"
    with pytest.raises(ConfigError, match="hookpoint: expected a module path of owner/name"):
        place(model="owner/name")


def test_a_run_that_holds_nothing_is_discarded_with_the_folder_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start.new_run(RunConfig())
    (run / "metrics.jsonl").touch()
    assert not start.discard_if_empty(run)
    (run / "metrics.jsonl").unlink()
    (run / ".metrics.jsonl.0123.partial").touch()
    assert start.discard_if_empty(run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"k": 1025}, {"k_aux": 1025}])
def test_more_latents_than_a_gpu_selects_are_told_before_anything_is_read(
    settings: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show() -> None:
        config = RunConfig(ActivationsConfig(model=str(tmp_path / "no model")), TrainConfig(d_sae=4096, **settings))
        show_plan(config, tmp_path / "run", Console(quiet=True))

    monkeypatch.setattr("flashsae.backend._has_triton", lambda: True)
    monkeypatch.setattr("flashsae.start.resolve_device", lambda _: torch.device("cuda"))
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^{name}: expected at most 1024 on a GPU, got 1025. FLASHSAE_BACKEND=ref"):
        show()
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
    with pytest.raises(ConfigError, match="no model"):
        show()
    monkeypatch.delenv("FLASHSAE_BACKEND")
    monkeypatch.setattr(sys.modules["flashsae.train.fit"], "resolve_device", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match=f"^{name}: expected at most 1024 on a GPU"):
        fit(torch.zeros(2, 3), d_sae=4096, k=settings.get("k", 1), config=TrainConfig(k_aux=settings.get("k_aux")))
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHSAE_BACKEND", "FLASHSAE_DENSE_ABOVE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "nonsense")
            with pytest.raises(ConfigError, match=f"^{name}: expected .*, got 'nonsense'"):
                start.check(RunConfig())

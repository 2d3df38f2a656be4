from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashsae.cli import main
from flashsae.cli.pace import LEAST_TOKENS, affordable_tokens, paced, training_rate
from flashsae.settings.run import RunConfig
from flashsae.train import TrainConfig


@pytest.mark.parametrize(
    ("rate", "tokens"),
    [(1e9, 1_500_000), (30_000, 1_500_000), (12_000, 1_000_000), (9_000, 400_000), (1, LEAST_TOKENS)],
)
def test_a_slow_machine_gets_fewer_tokens(rate: float, tokens: int) -> None:
    assert affordable_tokens(rate, 1_500_000) == tokens


def test_the_rate_is_that_of_whole_steps() -> None:
    config = TrainConfig(d_sae=64, k=4, batch_tokens=32, device="cpu")
    assert 32 < training_rate(config, 8) < 1e8


def test_only_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.cli.pace.training_rate", lambda config, d_in: 12_000)
    config = RunConfig(train=TrainConfig(device="cpu"))
    slower, why = paced(config)
    assert (slower.activations, slower.train.tokens) == (config.activations, 1_000_000)
    assert why.startswith(
        "Training on 1,000,000 tokens instead of 1,500,000, to end within a few minutes: this machine"
    )
    assert "12,000 tokens a second. --tokens 1500000 trains on all." in why
    monkeypatch.setattr("flashsae.cli.pace.resolve_device", lambda device: torch.device("meta"))
    assert paced(config) == (config, "")


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ([], 1_000_000),
        (["--no-report"], 1_000_000),
        (["--tokens", "1_500_000"], 1_500_000),
        (["--k", "16"], 1_500_000),
        (["--config", "demo.toml"], 1_500_000),
    ],
)
def test_only_the_demo_chooses_its_tokens_and_keeps_them(
    settings: list[str], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHSAE_DEVICE", "cpu")
    Path("demo.toml").write_text("tokens = 1_500_000", "utf-8")
    trained = []
    monkeypatch.setattr(
        "flashsae.run.execute.execute",
        lambda run, console: trained.append(RunConfig.from_toml(run / "config.toml").train.tokens),
    )
    monkeypatch.setattr("flashsae.cli.pace.training_rate", lambda config, d_in: 12_000)
    _train(*settings, "--run", "run")
    monkeypatch.setattr("flashsae.cli.pace.training_rate", lambda config, d_in: 1)
    _train("--resume", "run")
    assert trained == [tokens, tokens]


def _train(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:  # cyclopts ends the process
        main(["train", *words])
    assert not ended.value.code

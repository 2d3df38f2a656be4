"""What is settled before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsae.errors import ConfigError, StorageError
from flashsae.run import start
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


def test_a_run_whose_name_another_one_takes_meanwhile_gets_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = Path("runs/minilm-encoder.layer.2")

    def slow(config: RunConfig) -> str:
        if not theirs.exists():
            theirs.mkdir(parents=True)
            (theirs / "config.toml").write_text("theirs")
        return ""

    monkeypatch.setattr(RunConfig, "to_toml", slow)
    assert start.new_run(RunConfig()) == Path("runs/minilm-encoder.layer.2-2")
    assert (theirs / "config.toml").read_text() == "theirs"
    theirs = Path("asked")
    with pytest.raises(StorageError, match="asked exists already"):
        start.new_run(RunConfig(), theirs)


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


def test_a_device_that_is_not_there_is_told_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"^device: expected auto, cpu or a CUDA .*, got 'cuda:77'"):
        start.check(RunConfig(train=TrainConfig(device="cuda:77")))


def test_the_environment_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHSAE_BACKEND", "FLASHSAE_DENSE_ABOVE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "nonsense")
            with pytest.raises(ConfigError, match=f"^{name}: expected .*, got 'nonsense'"):
                start.check(RunConfig())

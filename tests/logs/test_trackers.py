from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashsae.errors import ConfigError, MissingExtraError
from flashsae.logs.trackers import build_logger

RECORD = {"step": 3, "tokens": 30, "loss": 0.5, "fvu": 0.5, "dead_latents": 2.0, "lr": 1e-3}


def test_tensorboard_receives_every_figure(tmp_path: Path) -> None:
    with build_logger("tensorboard", tmp_path, {}) as logger:
        logger.on_start(0, 10)
        logger.on_log(RECORD)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == RECORD.keys() - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(3, 0.5)]


def test_wandb_receives_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Run:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append((record, step))

        def finish(self) -> None:
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**options: object) -> Run:
            calls.append(options["config"])
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with build_logger("wandb", tmp_path, {"k": 4}) as logger:
        logger.on_log(RECORD)
    assert calls == [{"k": 4}, (RECORD, 3), "finished"]


def test_a_logger_that_is_not_there_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'flashsae\[wandb\]'"):
        build_logger("wandb", tmp_path, {})
    with pytest.raises(ConfigError, match="logger: expected one of tensorboard, wandb, got 'mlflow'"):
        build_logger("mlflow", tmp_path, {})

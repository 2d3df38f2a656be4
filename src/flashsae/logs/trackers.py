"""Opt-in logs beside metrics.jsonl: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flashsae.errors import ConfigError, require
from flashsae.files import atomic
from flashsae.logs.callback import Callback
from flashsae.natural import did_you_mean


class TensorBoardLog(Callback):
    """Write every record as TensorBoard scalars under RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        """Open the log; what a killed run wrote behind the checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        with atomic.storage_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def on_log(self, record: Mapping[str, float]) -> None:
        """Write a scalar for each entry."""
        with atomic.storage_errors(self._folder):
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            with suppress(OSError):  # of figures that are also in metrics.jsonl
                self._writer.close()


class WandbLog(Callback):
    """Send every record to Weights & Biases, as the run's folder name; of several SAEs, in a group of theirs."""

    def __init__(self, run: Path, config: Mapping[str, Any], *, is_one_of_several: bool = False) -> None:
        wandb = require("wandb", "wandb")
        several = {"group": run.parent.name, "reinit": "create_new"} if is_one_of_several else {}
        self._run = wandb.init(
            project="flashsae", name=run.name, dir=str(run), config=dict(config), resume="allow", **several
        )

    def on_log(self, record: Mapping[str, float]) -> None:
        """Send a record."""
        self._run.log(dict(record), step=int(record["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


LOGGERS = ("tensorboard", "wandb")


def check_logger(name: str) -> None:
    """Raise ConfigError or MissingExtraError where `build_logger` would."""
    if name not in LOGGERS:
        raise ConfigError(f"logger: expected one of {', '.join(LOGGERS)}, got {name!r}.{did_you_mean(name, LOGGERS)}")
    require(name, name)


def build_logger(name: str, run: Path, config: Mapping[str, Any], *, is_one_of_several: bool = False) -> Callback:
    """Return an opt-in logger by name.

    Raises:
        ConfigError: there is no logger of that name.
        MissingExtraError: its package is not installed.
    """
    check_logger(name)
    if name == "tensorboard":
        return TensorBoardLog(run)
    return WandbLog(run, config, is_one_of_several=is_one_of_several)

"""Who hears of a run's progress: the JSONL log, a progress bar, TensorBoard, wandb. One small interface."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typing_extensions import Self

from flashsae import files
from flashsae.data.shuffle import OnFill
from flashsae.errors import CheckpointError, ConfigError, require
from flashsae.train.log_file import LOG_FILE, make_line, read_log

SECONDS_BETWEEN_LINES = 20


class Callback:
    """Does nothing; override what you need. Used as a context manager around the training."""

    def on_start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`; `step` > 0 when it is resumed."""

    def on_step(self, step: int) -> None:
        """A step is done; nothing is read from the device for this call."""

    def on_log(self, record: Mapping[str, float]) -> None:
        """A line of the log: step, tokens, loss, fvu, l0, dead_latents, lr, tokens_per_second, ..."""

    def on_warning(self, message: str) -> None:
        """The training goes on, but its result may not be what was meant; a sentence or two that say why."""

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint of this step is about to be written; what was told of must be on the disk by then."""

    def close(self) -> None:
        """Training has ended, or failed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Warn(Callback):
    """Pass warnings on.

    Args:
        warn: called with each message.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn

    def on_warning(self, message: str) -> None:
        """Pass on a warning."""
        self._warn(message)


class JsonlLog(Callback):
    """Append every record to RUN/metrics.jsonl. When resumed, drop the lines behind the checkpoint first."""

    def __init__(self, run: Path) -> None:
        self._path = run / LOG_FILE
        self._file: TextIO | None = None
        self._checksum = 0

    def on_start(self, step: int, steps: int) -> None:
        """Open the log and cut it to what the checkpoint knows of; CheckpointError if it does not reach that far."""
        kept = list(takewhile(lambda record: record["step"] <= step, read_log(self._path)))
        if step and (not kept or kept[-1]["step"] != step):
            raise CheckpointError(
                f"{self._path} does not reach the checkpoint of step {step}: put the whole file back, or remove the "
                "folder checkpoints to train from the start."
            )
        self._checksum, text = 0, ""
        for record in kept:
            line, self._checksum = make_line(record, self._checksum)
            text += line + "\n"
        files.write_atomic(self._path, text)
        with files.storage_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def on_log(self, record: Mapping[str, float]) -> None:
        """Write a line, at once."""
        if self._file is not None:
            line, self._checksum = make_line(record, self._checksum)
            with files.storage_errors(self._path):
                self._file.write(line + "\n")
                self._file.flush()

    def on_checkpoint(self, step: int) -> None:
        """Flush the lines to the disk, so that no checkpoint is ahead of its log."""
        if self._file is not None:
            with files.storage_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; every line is on disk already, or its failure has been told."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


class StageBar:
    """The progress of a long stage: a bar with rate and remaining time; where there is no terminal, lines.

    A line a tenth, or where the end is not known, one now and then and the last.

    Args:
        console: to draw on.
        stage: what is going on, such as "training".
        unit: what is counted, such as "steps".
    """

    def __init__(self, console: Console, stage: str, unit: str) -> None:
        self._console = console
        self._stage, self._unit = stage, unit
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._total: int | None = None
        self._task: TaskID | None = None
        self._tenth = 0
        self._done = 0
        self._said = (0, time.monotonic())
        self._note = ""

    @property
    def is_started(self) -> bool:
        """Whether anything has been shown."""
        return self._task is not None

    def start(self, done: int, total: int | None) -> None:
        """Show the stage at `done` of `total`; None where the end is not known."""
        self._total = total
        self._tenth = 10 * done // total if total else 0
        self._task = self._bar.add_task(self._stage, total=total, completed=done, note="")
        if self._console.is_terminal:
            self._bar.start()

    def update(self, done: int, note: str | None = None) -> None:
        """Move to `done`, with a word on what it brought."""
        if self._task is None:
            return
        self._note = self._note if note is None else note
        self._bar.update(self._task, completed=done, note=self._note)
        self._done = done
        if self._console.is_terminal:
            return
        if self._total is None:
            if time.monotonic() - self._said[1] >= SECONDS_BETWEEN_LINES:
                self._say()
        elif 10 * done // self._total > self._tenth:
            self._tenth = 10 * done // self._total
            self._say()

    def _say(self) -> None:
        of = "" if self._total is None else f" of {self._total:,}"
        self._console.print(f"{self._stage}: {self._done:,}{of} {self._unit}  {self._note}".rstrip(), highlight=False)
        self._said = (self._done, time.monotonic())

    def finish(self) -> None:
        """Leave the bar full: all is done, even if it was less than expected."""
        if self._task is not None and self._total is not None and self._done != self._total:
            self._total = self._done
            self._bar.update(self._task, total=self._done)
            if not self._console.is_terminal:
                self._say()
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar.live.is_started:
            self._bar.stop()
        if self._total is None and not self._console.is_terminal and self._done > self._said[0]:
            self._say()


@contextmanager
def filling(console: Console) -> Iterator[OnFill]:
    """Show how a shuffle buffer is filled as a `StageBar`; nothing is shown unless what this gives is called.

    Args:
        console: to draw on.
    """
    bar = StageBar(console, "shuffle buffer", "tokens")

    def on_fill(done: int, total: int) -> None:
        if not bar.is_started:
            bar.start(0, total)
        bar.update(done)

    try:
        yield on_fill
        bar.finish()
    finally:
        bar.stop()


class _Rate(ProgressColumn):
    """The rate of a task, such as 14/s."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        speed = task.finished_speed or task.speed
        shown = "" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"
        return Text(shown, style="cyan")


class ProgressBar(Callback):
    """The training as a `StageBar`."""

    def __init__(self, console: Console) -> None:
        self._bar = StageBar(console, "training", "steps")
        self._note: str | None = None

    def on_start(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._bar.start(step, steps)

    def on_log(self, record: Mapping[str, float]) -> None:
        """Keep the newest figures for the next step of the bar."""
        self._note = f"FVU {record['fvu']:.3f}  dead {record['dead_latents']:.0f}"

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(step, self._note)

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


class TensorBoardLog(Callback):
    """Write every record as TensorBoard scalars under RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        """Open the log; what a killed run wrote behind the checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        with files.storage_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def on_log(self, record: Mapping[str, float]) -> None:
        """Write a scalar for each entry."""
        with files.storage_errors(self._folder):
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            with suppress(OSError):  # of figures that are also in metrics.jsonl
                self._writer.close()


class WandbLog(Callback):
    """Send every record to Weights & Biases, as the run's folder name."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "wandb")
        self._run = wandb.init(project="flashsae", name=run.name, dir=str(run), config=dict(config), resume="allow")

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
        raise ConfigError(f"logger: expected one of {', '.join(LOGGERS)}, got {name!r}.")
    require(name, name)


def build_logger(name: str, run: Path, config: Mapping[str, Any]) -> Callback:
    """Return an opt-in logger by name.

    Raises:
        ConfigError: there is no logger of that name.
        MissingExtraError: its package is not installed.
    """
    check_logger(name)
    return TensorBoardLog(run) if name == "tensorboard" else WandbLog(run, config)

"""The progress of long stages: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

from flashsae.data.shuffle import OnFill
from flashsae.logs.callback import Callback
from flashsae.metrics import METRICS

SECONDS_BETWEEN_LINES = 20
_IN_SHORT = ("fvu", "dead_latents")
"""What the bar of a training shows of a record."""


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
        rows = (METRICS[name] for name in _IN_SHORT if name in record)
        self._note = "  ".join(f"{row.label} {row.show(record[row.name])}" for row in rows)

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(step, self._note)

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()

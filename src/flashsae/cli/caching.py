"""What `flashsae cache` does: write a cache of activations, merge some, or look at one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flashsae.backend import resolve_device
from flashsae.cli.describe import described, write_described
from flashsae.data.cache_index import verify_cache
from flashsae.data.cache_merge import merge_caches
from flashsae.data.cache_summary import summarise
from flashsae.data.open import cache_activations
from flashsae.errors import ConfigError
from flashsae.logs.progress import StageBar
from flashsae.settings.reading import ReadingConfig


@dataclass(frozen=True)
class CacheTask:
    """What is asked for, as the options of the command are called."""

    out: Path | None
    max_tokens: int | None
    device: str
    merge: tuple[Path, ...]
    verify: Path | None
    describe: Path | None
    json: Path | None

    def check(self) -> None:
        """Raise ConfigError where an option is missing."""
        if self.json is not None and self.describe is None:
            raise ConfigError("json: expected --describe FOLDER beside it, which is what is written to it.")
        if self.out is None and self.verify is None and self.describe is None:
            raise ConfigError(
                "out: expected --out FOLDER for a cache to be written, or --verify or --describe FOLDER to look at one."
            )


def work_on_cache(task: CacheTask, reading: ReadingConfig, console: Console) -> None:
    """Do what is asked for.

    Raises:
        FlashSAEError: it cannot be done.
        SystemExit: it was stopped.
    """
    if task.verify is not None:
        files, size = verify_cache(task.verify)
        _say(console, f"{task.verify}: all {files:,} files are as they were written ({size / 1e9:.2f} GB)")
    elif task.describe is not None:
        summary = summarise(task.describe)
        for each in described(summary):
            console.print(each)
        if task.json is not None:
            write_described(summary, task.json)
    elif task.out is not None:
        if task.merge:
            bar = StageBar(console, "merging", "tokens")
            bar.start(0, None)
            try:
                merge_caches(task.merge, task.out, bar.update)
            finally:
                bar.stop()
        else:
            _write(task, task.out, reading, console)
        _say(console, f"Train on them: flashsae train --activations {task.out}")


def _write(task: CacheTask, out: Path, reading: ReadingConfig, console: Console) -> None:
    place = str(resolve_device(task.device))
    bar = StageBar(console, "activations", "tokens")
    bar.start(0, task.max_tokens)
    try:
        warnings = cache_activations(
            reading,
            out,
            max_tokens=task.max_tokens,
            device=place,
            on_progress=bar.update,
            on_inputs=lambda told: _say(console, f"inputs: {told}"),
        )
    except KeyboardInterrupt:
        bar.stop()
        console.print("\nStopped. The same command continues it.", highlight=False)
        raise SystemExit(130) from None
    finally:
        bar.stop()
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _say(console: Console, told: str) -> None:
    console.print(told, highlight=False, soft_wrap=True, markup=False)

"""The command line, in this process."""

from __future__ import annotations

from pathlib import Path

from flashsae.cli import main


def run_main(*arguments: str | Path) -> int:
    """Do what a command does; return its exit status."""
    try:
        main(list(map(str, arguments)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0

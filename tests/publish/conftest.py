"""A small run that has ended, and a stand-in for the hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import hub as stand_in
from helpers import published
from helpers.hub import WRITER, Hub


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one SAE; not to be changed."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    return published.write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories, and an account that may write."""
    with stand_in.running() as running:
        stand_in.use(running, tmp_path / "home", monkeypatch, WRITER)
        yield running

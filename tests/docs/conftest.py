"""A small model and an SAE of it, which examples and pages are run with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model with its tokenizer, and an SAE of it: their folders."""
    from helpers import little_model

    return little_model.make(tmp_path_factory.mktemp("little"))

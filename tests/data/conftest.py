"""What several test files of this folder share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from helpers import tiny_models


@pytest.fixture(scope="session")
def cache_source() -> LanguageModelSource:
    """The source that `written` holds."""
    return tiny_models.source(tiny_models.CACHED)


@pytest.fixture(scope="session")
def written(cache_source: LanguageModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of several shards, to be read only."""
    directory = tmp_path_factory.mktemp("cache") / "whole"
    write_cache(directory, cache_source, shard_rows=tiny_models.SHARD_ROWS)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """The same cache, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))

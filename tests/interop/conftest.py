"""Here our files meet the libraries that they are for; `make test-interop` brings these, `make test` passes this by."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PEERS = "sae_lens", "sparsify", "dictionary_learning", "sae_bench"


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in PEERS if find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"tests/interop needs {', '.join(missing)}, which is not here: run `make test-interop`")
    config.addinivalue_line("filterwarnings", "ignore")  # what others warn of is not ours to mend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)

"""Runs that draw nothing and load the model once, for tests of what runs do besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flashsae.data import language_model
from flashsae.report import plots


@contextmanager
def quick_runs() -> Iterator[None]:
    """Draw nothing meanwhile, and load each model once."""
    load = language_model.load_with_account
    loaded: dict[str, Any] = {}

    def once(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in loaded:
            loaded[key] = load(*args, **kwargs)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "load_with_account", once)
        for name in ("curve", "histogram", "dots"):
            patch.setattr(plots, name, lambda *_, **__: "<svg></svg>")
        yield

from __future__ import annotations

import sys
import types

import pytest

from flashsae.errors import MissingExtraError, require


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'no_such_package', .* pip install 'flashsae\[report\]'"
    ):
        require("no_such_package", "report")


def test_a_package_that_is_there_but_broken_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "broken_package":
                raise ModuleNotFoundError("No module named 'its_dependency'", name="its_dependency")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="its_dependency"):
        require("broken_package", "hf")


def test_require_returns_the_module() -> None:
    assert isinstance(require("json", "hf"), types.ModuleType)

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from flashsae.architecture import architecture_named, architecture_names
from helpers.pages import ROOT

PAGE = (ROOT / "docs" / "architectures.md").read_text("utf-8")
ROWS = {row[1].strip(" `"): row for row in (line.split("|") for line in PAGE.splitlines()) if len(row) == 8}


@pytest.mark.parametrize("name", architecture_names(installed=False))
def test_each_has_a_row_with_its_settings_and_its_source(name: str) -> None:
    architecture, row = architecture_named(name), ROWS[name]
    own = {field.name for field in fields(architecture.settings)}
    if "of the selection" in row[4]:  # whose class theirs inherits from
        own -= {field.name for field in fields(architecture.settings.__mro__[1])}
    assert own == set(re.findall(r"`(\w+)`", row[4]))
    first = re.split(r"[ ,]", architecture.source)[0]
    assert first in row[5]

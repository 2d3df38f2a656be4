"""Names in the order in which people count."""

from __future__ import annotations

import re
from collections.abc import Iterable


def in_order(names: Iterable[str]) -> list[str]:
    """Return names sorted, 2 before 10."""
    return sorted(names, key=_key)


def _key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

"""Names as people count and spell them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def in_order(names: Iterable[str]) -> list[str]:
    """Return names sorted, 2 before 10."""
    return sorted(names, key=_key)


def did_you_mean(got: object, known: Iterable[str], likeness: float = 0.8) -> str:
    """Return the sentence that asks for the nearest of the known names, with a space before it; "" where none is near.

    Args:
        got: what was given; capitals do not count.
        known: the names there are.
        likeness: from 0 to 1, how alike two names have to be. Values that stand for something else may look alike, as
            float16 and float32 do.
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(got).lower(), names, n=1, cutoff=likeness)
    return f" Did you mean {names[near[0]]}?" if near else ""


def _key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

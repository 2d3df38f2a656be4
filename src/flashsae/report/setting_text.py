"""Settings as text, without what they tell of the machine that they were made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flashsae.report.cards import printable

_START = r"(?:file://)?(?:~[^/\\\s]*|[A-Za-z]:|\.\.)?[/\\]"
_FOLDERS = re.compile(rf"{_START}.*", re.DOTALL)
"""A path from the root, home, a drive or the folder above: it tells of the machine, and its last part is enough."""
_BETWEEN = re.compile(rf"(,\s*|\s+(?={_START}))")
"""What stands between several, as in a mixture."""
_BEHIND_A_SIGN = re.compile(rf"(?<=[=(\"'\[]){_START}[^\s,;\"')\]]*")


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List settings by name, tables within as table.name."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def setting_text(value: Any) -> str:
    """Write a setting; of a path that tells of the machine only the last part."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return printable(without_folders(text))


def without_folders(text: str) -> str:
    """Return a text with only the last part of each path in it that tells of the machine."""
    pieces = _BETWEEN.split(text)
    return "".join(
        _last_part(piece) if _FOLDERS.fullmatch(piece) else _BEHIND_A_SIGN.sub(lambda path: _last_part(path[0]), piece)
        for piece in pieces
    )


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "a folder"

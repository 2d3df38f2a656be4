"""Figures of the report as files of their own, on light paper: a card is shown where their variables have no values."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

_ROOM = 8.0
"""Points around a figure for what reaches over its edge, which a page shows and a picture of its own would cut."""


def alone(svg: str) -> str:
    """Return an `<svg>` of the report as the content of a file."""
    x, y, width, height = map(float, re.findall(r"-?[\d.]+", re.search(r'viewBox="([^"]*)"', svg)[1]))  # type: ignore[index]
    left, top, wide, high = x - _ROOM, y - _ROOM, width + 2 * _ROOM, height + 2 * _ROOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{2 * wide:g}" '
        f'height="{2 * high:g}" viewBox="{left:g} {top:g} {wide:g} {high:g}" stroke-linejoin="round">'
        "<style>text { font-family: 'DejaVu Sans', Verdana, sans-serif !important }</style>"
        f'<rect x="{left:g}" y="{top:g}" width="{wide:g}" height="{high:g}" fill="var(--paper)"/>'
    )
    whole = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub(r"var\((--[\w-]+)\)", lambda name: _colours()[name[1]], whole) + "\n"


@functools.cache
def _colours() -> dict[str, str]:
    """Return the colours of light pages by the names of their variables."""
    found: dict[str, str] = {}
    for sheet in ("style.css", "comparison.css"):
        text = files("flashsae.report").joinpath(sheet).read_text("utf-8")
        for name, value in re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{3,8})", text):
            found.setdefault(name, value)
    return found

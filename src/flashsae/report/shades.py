"""Shades over the patches of an image, as a picture that a page can lay over it."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from typing import Any

from flashsae.report.snippet_file import Picture, Shaded, Snippets

_HEAT, _COLD = (249, 115, 22), (37, 99, 235)
_LEAST, _MOST = 0.18, 0.78
"""Opacity of a patch that is hardly active, and of one that is as active as any."""


def shades(acts: list[float], columns: int, max_act: float) -> str:
    """Return a PNG of a pixel a patch in base64: the stronger the shade, the higher the value.

    Args:
        acts: by patch, row by row; below 0 they are blue.
        columns: of the patches.
        max_act: of the latent.
    """
    pixels = bytearray()
    for place, act in enumerate(acts):
        if place % columns == 0:
            pixels.append(0)  # a line without a filter
        whole = abs(max_act)
        weight = min(abs(act) / whole, 1.0) if 0 < whole < math.inf else 0.0
        alpha = round(255 * (_LEAST + (_MOST - _LEAST) * weight)) if act else 0
        pixels += bytes((*(_HEAT if act >= 0 else _COLD), alpha))
    head = struct.pack(">IIBBBBB", columns, len(acts) // columns, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(pixels), 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return base64.b64encode(png).decode()


def example(shaded: Shaded, picture: Picture, max_act: float) -> dict[str, Any]:
    """Return what the template shows of an image: shades, and where the peak is, in per cent of its sides."""
    peak = f"{shaded.acts[shaded.peak]:.3g}"
    shown: dict[str, Any] = {
        "picture": shaded.picture,
        "name": picture.name,
        "peak": peak,
        "is_training": shaded.split == "train",
        "is_gone": not picture.jpeg,
        "ratio": f"{picture.width} / {picture.height}",
        "shades": "",
        "spot": "",
        "told": f"{picture.name}: {peak}",
    }
    if picture.rows:
        row, column = divmod(shaded.peak, picture.columns)
        high, wide = 100 / picture.rows, 100 / picture.columns
        shown["shades"] = shades(shaded.acts, picture.columns, max_act)
        shown["spot"] = f"left:{column * wide:.2f}%;top:{row * high:.2f}%;width:{wide:.2f}%;height:{high:.2f}%"
        shown["told"] = f"{picture.name}: {peak} at the patch in row {row + 1}, column {column + 1}"
    return shown


def stylesheet(snippets: Snippets | None) -> str:
    """Return a rule for each picture, so that it stands in the page once, however many latents it is shown for."""
    pictures = snippets.pictures if snippets else []
    return "".join(
        f".photo-{number}{{background-image:url(data:image/jpeg;base64,{picture.jpeg})}}\n"
        for number, picture in enumerate(pictures)
        if picture.jpeg
    )

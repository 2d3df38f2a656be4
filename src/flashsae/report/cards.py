"""What the template shows of single latents: their cards, and what is known of those that have none."""

from __future__ import annotations

import base64
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashsae.metrics.numbers import compact
from flashsae.report.drawing import Array
from flashsae.report.shades import example
from flashsae.report.snippet_file import LatentSnippets, Picture, Snippet, Snippets

_OPEN_SNIPPETS = 4
_LONGEST_TOKEN = 60
"""Letters of a token that a card lists; the texts below it show tokens in full."""
_BREAKING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What would break lines, turn the reading direction or not encode."""
_SELECTORS = re.compile(r"[\ufe00-\ufe0f]")
_BLANKS = {" ": "␣", "\t": "⇥", "\n": "↵"}
_LEVELS = 254


def card(latent: LatentSnippets, pictures: Sequence[Picture] = ()) -> dict[str, Any]:
    """Return what the template shows of a latent; pictures are those that its images are among."""
    tallest = max(latent.histogram, default=0)
    snippets = [_example(snippet, latent.max_act) for snippet in latent.snippets]
    images = [example(shaded, pictures[shaded.picture], latent.max_act) for shaded in latent.images]
    for image in images:
        image["name"], image["told"] = printable(image["name"]), printable(image["told"])
    return {
        "index": latent.index,
        "density": latent.density,
        "density_text": density_text(latent.density),
        "max": abs(latent.max_act),
        "ends": [f"{end:.4g}" for end in sorted((latent.least_act, latent.max_act))],
        "has_minus": min(latent.least_act, latent.max_act) < 0,
        "max_act": f"{latent.max_act:.3g}",
        "mean_act": f"{latent.mean_act:.3g}",
        "top_tokens": [_shortened(_legible(token)) for token in latent.top_tokens],
        # The square root keeps rare large values visible beside many small ones.
        "bars": [round(math.sqrt(max(count, 0) / tallest), 3) if tallest else 0.0 for count in latent.histogram],
        "snippets": snippets[:_OPEN_SNIPPETS],
        "more": snippets[_OPEN_SNIPPETS:],
        "images": images[:_OPEN_SNIPPETS],
        "more_images": images[_OPEN_SNIPPETS:],
    }


def _example(snippet: Snippet, max_act: float) -> dict[str, Any]:
    return {
        "peak": f"{snippet.acts[snippet.peak]:.3g}",
        "is_training": snippet.split == "train",
        "segments": _segments(snippet, max_act),
    }


def _segments(snippet: Snippet, max_act: float) -> list[dict[str, Any]]:
    """Split a text into runs of plain tokens and single tokens that are active, weight = value / max_act.

    Tokens that make up one character are one piece, with the largest of their values.
    """
    segments: list[dict[str, Any]] = []
    first = 0
    for i, token in enumerate(snippet.tokens):
        if not token and i + 1 < len(snippet.tokens):
            continue  # the first bytes of a character, which a token behind shows
        values, is_peak = snippet.acts[first : i + 1], first <= snippet.peak <= i
        first = i + 1
        value = max(map(abs, values))
        is_active = value > 0
        text = _legible(token) if is_active else printable(token)
        bare = text.lstrip(" ")
        plain = text[: len(text) - len(bare)] if is_active else text
        if plain and segments and not segments[-1]["value"]:
            segments[-1]["text"] += plain
        elif plain:
            segments.append({"text": plain, "value": "", "weight": 0.0, "peak": False, "minus": False})
        if is_active:
            weight = round(min(value / abs(max_act), 1.0), 2) if 0 < abs(max_act) < math.inf else 0.0
            minus = max(values, key=abs) < 0
            shown = {"text": bare, "value": _values(values), "weight": weight, "peak": is_peak, "minus": minus}
            segments.append(shown)
    if segments and not segments[0]["value"]:
        segments[0]["text"] = segments[0]["text"].lstrip(" ")  # of the word that the stretch begins with
    return [segment for segment in segments if segment["text"]]


def _values(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{', '.join(f'{value:.3g}' for value in values)} on the {len(values)} tokens of this character"


def printable(text: str) -> str:
    """Return text with line breaks as ↵, and other characters that would break a line or turn it as what they are."""
    text = text.replace("\r\n", "\n").replace("\n", "↵ ").replace("\t", " ")
    return _BREAKING.sub(lambda found: _name(found[0]), text)


def _legible(token: str) -> str:
    """Return a token as `printable` does, or letter by letter where nothing of it would be seen."""
    if any(not _is_unseen(letter) for letter in token):
        return printable(token)
    return "".join(_BLANKS.get(letter) or _name(letter) for letter in token) or "∅"


def _is_unseen(letter: str) -> bool:
    return letter.isspace() or unicodedata.category(letter) in {"Cc", "Cf", "Cs"} or bool(_SELECTORS.match(letter))


def _name(letter: str) -> str:
    """Name a character that cannot be seen: ␛, or ⟨U+200B⟩."""
    if letter <= "\x1f":
        return chr(0x2400 + ord(letter))
    return "␡" if letter == "\x7f" else f"⟨U+{ord(letter):04X}⟩"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TOKEN else f"{text[:_LONGEST_TOKEN]}… ({len(text):,} characters)"


def density_text(density: float) -> str:
    """Write a density in per cent with two figures that count."""
    if not 0 < density < 1e-5:
        return f"{100 * density:.2g}%" if density < 0.995 else "100%"
    return f"{100 * density:.1e}%"


def known_of_all(arrays: Mapping[str, Array], snippets: Snippets | None) -> dict[str, Any]:
    """Pack what is known of every latent for the script: one byte of density each, one bit for dead.

    Level 0 is a latent that was not active, level n one of density 10^(low + (n - 1) · step).
    """
    density = np.nan_to_num(arrays["latent_density"], nan=0.0, posinf=0.0, neginf=0.0)
    exponent = np.log10(density, where=density > 0, out=np.zeros(len(density)))
    active = exponent[density > 0]
    low, high = (float(active.min()), float(active.max())) if active.size else (0.0, 0.0)
    step = (high - low) / (_LEVELS - 1)
    levels = np.where(density > 0, 1 + np.round((exponent - low) / (step or 1.0)), 0)
    dead = np.packbits(arrays["is_dead"] > 0, bitorder="little").tobytes() if "is_dead" in arrays else b""
    return {
        "d_sae": len(density),
        "low": low,
        "step": step,
        "density": base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),
        "dead": base64.b64encode(dead).decode(),
        "sample": "the sample" if snippets is None else f"the {compact(snippets.tokens)} {snippets.unit} of the sample",
    }


def sample_text(snippets: Snippets) -> str:
    """Say which split the sample and the texts, or images, on the cards are of."""
    held_out, is_text = snippets.held_out_tokens, not snippets.pictures
    what = "texts" if is_text else "images"
    if held_out is None:
        return f"Which {what} are held out was not written down."
    splits = [text.split for latent in snippets.latents for text in latent.snippets]
    splits += [image.split for latent in snippets.latents for image in latent.images]
    shown, trained = len(splits), splits.count("train")
    part = "All of them are held out" if held_out >= snippets.tokens else f"{held_out:,} of them are held out"
    if not trained:
        seen = "their documents" if is_text else "any of them"
        return f"{part}, and so is every {what[:-1]} below: training never saw {seen}."
    of = "of documents" if is_text else "ones"
    return (
        f"{part}, too few for all examples: {shown - trained:,} of the {shown:,} {what} below are {of} that training "
        f"never saw, and {trained:,}, marked “training”, {of} that it did see."
    )

"""The file of the texts on which latents fire: snippets.json, its content and how it is written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashsae.data.sources import Split
from flashsae.errors import CheckpointError
from flashsae.files import load_json, write_atomic

FORMAT = 1


@dataclass(frozen=True)
class Snippet:
    """A stretch of one text around a token on which a latent fires.

    Args:
        tokens: text of each token; joined with nothing between, they read as text. Empty for a token with the first
            bytes of a character that the next one completes.
        acts: value of the latent at each token, 0 where it does not fire.
        peak: index of the token that the stretch was chosen for.
        split: of its document; None where that was not written down.
    """

    tokens: list[str]
    acts: list[float]
    peak: int
    split: Split | None = None


@dataclass(frozen=True)
class LatentSnippets:
    """What a reader needs to guess the meaning of a latent.

    Args:
        index: number of the latent, in [0, d_sae).
        density: fraction of the tokens read on which it fired.
        max_act: largest value.
        mean_act: mean over the tokens on which it fired.
        top_tokens: texts of the tokens with the largest total activation, largest first.
        histogram: numbers of tokens in equal bins of the value, from 0 to max_act.
        snippets: by descending peak, at most one a document.
    """

    index: int
    density: float
    max_act: float
    mean_act: float
    top_tokens: list[str]
    histogram: list[int]
    snippets: list[Snippet]


@dataclass(frozen=True)
class Snippets:
    """The latents that the report shows and what they were found in.

    Args:
        tokens: how many were read.
        latents: by ascending index.
        held_out_tokens: how many of the tokens are of held-out documents; None where that was not written down.
    """

    tokens: int
    latents: list[LatentSnippets]
    held_out_tokens: int | None = None


def write_snippets(path: Path, snippets: Snippets) -> None:
    """Write snippets.json atomically.

    Raises:
        StorageError: the file system refused.
    """
    write_atomic(path, json.dumps({"format": FORMAT, **asdict(snippets)}, separators=(",", ":")))


def read_snippets(path: Path) -> Snippets:
    """Read snippets.json.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format version.
    """
    stored = load_json(path)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a snippets file of format {FORMAT}; evaluate the run again to rewrite it."
        )
    try:
        held_out = stored.get("held_out_tokens")
        latents = [_latent_from_json(latent) for latent in stored["latents"]]
        return Snippets(int(stored["tokens"]), latents, None if held_out is None else int(held_out))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); evaluate the run again to rewrite it."
        ) from error


def _latent_from_json(stored: dict[str, Any]) -> LatentSnippets:
    return LatentSnippets(
        index=int(stored["index"]),
        density=float(stored["density"]),
        max_act=float(stored["max_act"]),
        mean_act=float(stored["mean_act"]),
        top_tokens=[str(token) for token in stored["top_tokens"]],
        histogram=[int(count) for count in stored["histogram"]],
        snippets=[_snippet_from_json(snippet) for snippet in stored["snippets"]],
    )


def _snippet_from_json(stored: dict[str, Any]) -> Snippet:
    tokens, acts = [str(token) for token in stored["tokens"]], [float(act) for act in stored["acts"]]
    peak = int(stored["peak"])
    if len(tokens) != len(acts) or not 0 <= peak < len(tokens):
        raise ValueError(f"a snippet has {len(tokens)} tokens, {len(acts)} activations and its peak at {peak}")
    split = stored.get("split")
    if split not in (None, "train", "held_out"):
        raise ValueError(f"a snippet is of the split {split!r}")
    return Snippet(tokens, acts, peak, split)

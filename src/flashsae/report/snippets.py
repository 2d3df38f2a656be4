"""Collect the texts on which a few dozen latents fire most: one pass over activations, bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashsae.data.sources import Chunk
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.files import load_json, write_atomic
from flashsae.report.tokens import token_strings

__all__ = [
    "LatentSnippets",
    "Snippet",
    "Snippets",
    "collect_snippets",
    "read_snippets",
    "token_strings",
    "write_snippets",
]

FORMAT = 1
MIN_FIRED = 10
"""Tokens on which a latent must have fired to be shown; rarer ones are shown only if there are no others."""
HISTOGRAM_BINS = 24
_TOP_TOKENS = 8

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
TokenText = Callable[[list[int]], list[str]]


@dataclass(frozen=True)
class Snippet:
    """A stretch of one text around a token on which a latent fires.

    Args:
        tokens: text of each token; joined with nothing between, they read as text.
        acts: value of the latent at each token, 0 where it does not fire.
        peak: index of the token that the stretch was chosen for.
    """

    tokens: list[str]
    acts: list[float]
    peak: int


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
    """The latents that the report shows, by ascending index, and the number of tokens they were found in."""

    tokens: int
    latents: list[LatentSnippets]


def collect_snippets(
    encode: Encode,
    chunks: Iterator[Chunk],
    token_text: TokenText,
    *,
    n_latents: int = 48,
    per_latent: int = 8,
    context: int = 16,
    max_tokens: int = 200_000,
) -> Snippets:
    """Find the texts on which latents fire most, for latents spread evenly over the ranks of density.

    Args:
        encode: [n, d_in] -> (top_acts [n, k], top_indices [n, k]).
        chunks: activations with token_ids and position.
        token_text: ids of consecutive tokens -> the text of each (see `token_strings`).
        n_latents: latents to show; fewer if fewer fired.
        per_latent: texts for each.
        context: tokens before and after the peak, within its model input.
        max_tokens: stop after so many. Memory: 8 bytes * k a token.
    Raises:
        ConfigError: a count is below its least value.
        DataError: the chunks carry no text, or there are none.
    Numerics: deterministic; equal values are taken in the order of the data.
    """
    for name, value, least in (
        ("n_latents", n_latents, 1),
        ("per_latent", per_latent, 1),
        ("context", context, 0),
        ("max_tokens", max_tokens, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}.")
    code = _encode_all(encode, chunks, max_tokens)
    shown = _spread(code.counts(), n_latents)
    latents = [
        _describe(code, latent, rows, acts, token_text, per_latent, context)
        for latent, (rows, acts) in zip(shown, code.firings(shown))
    ]
    return Snippets(len(code.token_ids), latents)


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
        return Snippets(int(stored["tokens"]), [_latent_from_json(latent) for latent in stored["latents"]])
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
    return Snippet(tokens, acts, peak)


@dataclass(frozen=True)
class _Code:
    """The sparse code of all tokens read, [n, k], with the document and model input that each came from."""

    top_acts: Tensor
    top_indices: Tensor
    token_ids: NDArray[np.int64]
    group: NDArray[np.int64]
    start: NDArray[np.int64]
    """[n], first row of the model input that a row belongs to."""
    stop: NDArray[np.int64]
    """[n], the row behind its last."""

    def counts(self) -> Tensor:
        """Return the number of tokens on which each latent up to the last that fired did fire."""
        return torch.bincount(self.top_indices[self.top_acts > 0])

    def firings(self, latents: list[int]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return for each of a few latents the rows on which it fires, ascending, and its values there."""
        if not latents:
            return []
        slot = torch.full((int(self.top_indices.max()) + 1,), -1, dtype=torch.int32)
        slot[latents] = torch.arange(len(latents), dtype=torch.int32)
        slots = slot[self.top_indices]
        rows, columns = ((slots >= 0) & (self.top_acts > 0)).nonzero(as_tuple=True)
        order = torch.sort(slots[rows, columns], stable=True)
        bounds = np.cumsum(torch.bincount(order.values, minlength=len(latents)).numpy())[:-1]
        values = self.top_acts[rows, columns][order.indices].numpy()
        return list(zip(np.split(rows[order.indices].numpy(), bounds), np.split(values, bounds)))


def _encode_all(encode: Encode, chunks: Iterator[Chunk], max_tokens: int) -> _Code:
    acts, indices, ids, groups, starts = [], [], [], [], []
    read = 0
    for chunk in chunks:
        if chunk.token_ids is None or chunk.position is None:
            raise DataError(
                "snippets need activations with token_ids and position; these have none, as plain arrays do."
            )
        if len(chunk.acts) == 0:
            continue
        part = chunk.select(torch.arange(min(len(chunk.acts), max_tokens - read), device=chunk.acts.device))
        assert part.token_ids is not None
        assert part.position is not None
        with torch.no_grad():
            top_acts, top_indices = encode(part.acts)
        acts.append(top_acts.detach().to("cpu", torch.float32))
        indices.append(top_indices.to("cpu", torch.int32))
        group, position = part.group.cpu().numpy(), part.position.cpu().numpy()
        begins = np.r_[True, (np.diff(group) != 0) | (np.diff(position) <= 0)]
        ids.append(part.token_ids.cpu().numpy().astype(np.int64))
        groups.append(group)
        starts.append(begins)
        read += len(group)
        if read >= max_tokens:
            break
    if not read:
        raise DataError("there is no token to collect snippets from: expected at least one chunk with rows.")
    begins = np.concatenate(starts).nonzero()[0]
    lengths = np.diff(np.append(begins, read))
    return _Code(
        torch.cat(acts),
        torch.cat(indices),
        np.concatenate(ids),
        np.concatenate(groups),
        begins.repeat(lengths),
        (begins + lengths).repeat(lengths),
    )


def _spread(counts: Tensor, n_latents: int) -> list[int]:
    """Choose latents at evenly spaced ranks of density, so that rare and frequent ones are both seen."""
    fired = (counts >= MIN_FIRED).nonzero()[:, 0]
    if len(fired) == 0:
        fired = counts.nonzero()[:, 0]
    ranked = fired[torch.sort(counts[fired], stable=True).indices]
    if len(ranked) > n_latents:
        # The middles of n_latents equal shares: neither the rarest nor the densest latent, which say little.
        ranked = ranked[(torch.arange(n_latents) * 2 + 1) * len(ranked) // (2 * n_latents)]
    return [int(latent) for latent in ranked.sort().values]


def _describe(
    code: _Code,
    latent: int,
    rows: NDArray[np.int64],
    acts: NDArray[np.float32],
    token_text: TokenText,
    per_latent: int,
    context: int,
) -> LatentSnippets:
    on_token = np.zeros(len(code.token_ids), dtype=np.float32)
    on_token[rows] = acts
    max_act = float(acts.max())
    return LatentSnippets(
        index=latent,
        density=len(rows) / len(code.token_ids),
        max_act=_short(max_act),
        mean_act=_short(float(acts.mean(dtype=np.float64))),
        top_tokens=_top_tokens(code.token_ids[rows], acts, token_text),
        histogram=np.histogram(acts, bins=HISTOGRAM_BINS, range=(0.0, max_act))[0].tolist(),
        snippets=[
            Snippet(
                token_text(code.token_ids[start:stop].tolist()),
                [_short(act) for act in on_token[start:stop].tolist()],
                peak - start,
            )
            for start, peak, stop in _best_windows(code, rows, acts, per_latent, context)
        ],
    )


def _best_windows(
    code: _Code, rows: NDArray[np.int64], acts: NDArray[np.float32], per_latent: int, context: int
) -> list[tuple[int, int, int]]:
    """Return (start, peak, stop) of the highest peaks: one a document, and no text twice."""
    by_act = rows[np.argsort(-acts, kind="stable")]
    first_of_document = np.sort(np.unique(code.group[by_act], return_index=True)[1])
    windows: list[tuple[int, int, int]] = []
    seen: set[bytes] = set()
    for peak in by_act[first_of_document].tolist():
        start = max(int(code.start[peak]), peak - context)
        stop = min(int(code.stop[peak]), peak + context + 1)
        text = code.token_ids[start:stop].tobytes()
        if text in seen:
            continue
        seen.add(text)
        windows.append((start, peak, stop))
        if len(windows) == per_latent:
            break
    return windows


def _top_tokens(ids: NDArray[np.int64], acts: NDArray[np.float32], token_text: TokenText) -> list[str]:
    unique, where = np.unique(ids, return_inverse=True)
    total = np.bincount(where.reshape(-1), weights=acts)
    texts: dict[str, None] = {}
    for i in np.argsort(-total, kind="stable")[: 3 * _TOP_TOKENS]:
        text = "".join(token_text([int(unique[i])]))
        texts.setdefault(text.strip() or text)
    return list(texts)[:_TOP_TOKENS]


def _short(value: float) -> float:
    return float(f"{value:.4g}")

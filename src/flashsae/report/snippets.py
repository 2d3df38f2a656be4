"""Collect the texts that activate a few dozen latents most: one pass over activations, bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.data.images import Pictures
from flashsae.data.sources import Chunk
from flashsae.errors import ConfigError, DataError
from flashsae.metrics import active_entries
from flashsae.ops.code import SparseCode
from flashsae.report.pictures import Illustrator
from flashsae.report.snippet_file import LatentSnippets, Shaded, Snippet, Snippets, read_snippets, write_snippets
from flashsae.report.tokens import TokenText, stretch_strings, token_strings

__all__ = [
    "LatentSnippets",
    "Snippet",
    "Snippets",
    "collect_snippets",
    "read_snippets",
    "token_strings",
    "write_snippets",
]

MIN_ACTIVE = 10
"""Tokens on which a latent must have been active to be shown; rarer ones are shown only if there are no others."""
HISTOGRAM_BINS = 24
_TOP_TOKENS = 8

Encode = Callable[[Batch], SparseCode]


def collect_snippets(
    encode: Encode,
    chunks: Iterator[Chunk],
    token_text: TokenText,
    *,
    training: Iterator[Chunk] | None = None,
    n_latents: int = 48,
    per_latent: int = 8,
    context: int = 16,
    max_tokens: int = 200_000,
) -> Snippets:
    """Find the texts that activate latents most, for latents spread evenly over the ranks of density.

    Args:
        encode: [n, d_in] by site -> SparseCode.
        chunks: activations of held-out documents, with token_ids and position.
        token_text: ids of consecutive tokens -> the text of each (see `token_strings`).
        training: those of documents that were trained on; read only where `chunks` ends before `max_tokens`, and
            shown only where a latent is active in too few of the held-out ones.
        n_latents: latents to show; fewer if fewer are active.
        per_latent: texts for each.
        context: tokens before and after the peak, within its model input.
        max_tokens: stop after so many. Memory: 12 bytes an active latent of a token.
    Raises:
        ConfigError: a count is below its least value.
        DataError: the chunks carry no text, or there are none.
    Numerics: deterministic; equal values are taken in the order of the data.
    """
    (found,) = collect_for_all(
        [encode], chunks, token_text, training=training, n_latents=n_latents, per_latent=per_latent, context=context,
        max_tokens=max_tokens,
    )  # fmt: skip
    return found


def collect_for_all(
    encoders: Sequence[Encode],
    chunks: Iterator[Chunk],
    token_text: TokenText | Pictures,
    *,
    training: Iterator[Chunk] | None = None,
    n_latents: int = 48,
    per_latent: int = 8,
    context: int = 16,
    max_tokens: int = 200_000,
) -> Iterator[Snippets]:
    """Yield what `collect_snippets` returns for each of several SAEs, of one reading of the same chunks.

    Args:
        encoders: of each SAE, called with the activations of all.
        token_text: as there, or the images that were read.
        chunks, training, n_latents, per_latent, context, max_tokens: as there.
    """
    for name, value, least in (
        ("n_latents", n_latents, 1),
        ("per_latent", per_latent, 1),
        ("context", context, 0),
        ("max_tokens", max_tokens, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}.")
    for code in _encode_all(encoders, chunks, iter(()) if training is None else training, max_tokens):
        yield _snippets(code, token_text, n_latents, per_latent, context)


def _snippets(code: _Code, token_text: TokenText | Pictures, n_latents: int, per_latent: int, context: int) -> Snippets:
    shown = _spread(code.counts(), n_latents)
    if isinstance(token_text, Pictures):
        drawer = Illustrator(token_text, code.group, code.token_ids, code.n_held_out)
        found = [
            _figures(code, latent, rows, acts, drawer.labels(rows, acts), images=drawer.shaded(rows, acts, per_latent))
            for latent, (rows, acts) in zip(shown, code.activations(shown))
        ]
        return Snippets(len(code.token_ids), found, code.n_held_out, drawer.drawn())
    latents = [
        _describe(code, latent, rows, acts, token_text, per_latent, context)
        for latent, (rows, acts) in zip(shown, code.activations(shown))
    ]
    return Snippets(len(code.token_ids), latents, code.n_held_out)


@dataclass(frozen=True)
class _Code:
    """The active entries of the code of all n tokens read, and the document and model input that each came from."""

    tokens: Tensor
    """[entries], int32, ascending: the row of the token."""
    latents: Tensor
    """[entries], int32."""
    acts: Tensor
    """[entries], float32, none of them 0."""
    token_ids: NDArray[np.int64]
    group: NDArray[np.int64]
    start: NDArray[np.int64]
    """[n], first row of the model input that a row belongs to."""
    stop: NDArray[np.int64]
    """[n], the row behind its last."""
    n_held_out: int
    """The rows before this one are of held-out documents."""

    def counts(self) -> Tensor:
        """Return the number of tokens on which each latent was active, up to the last that was."""
        return torch.bincount(self.latents)

    def activations(self, latents: list[int]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return for each of a few latents the rows on which it is active, ascending, and its values there."""
        if not latents:
            return []
        slot = torch.full((int(self.latents.max()) + 1,), -1, dtype=torch.int32, device="cpu")
        slot[latents] = torch.arange(len(latents), dtype=torch.int32, device="cpu")
        slots = slot[self.latents]
        shown = (slots >= 0).nonzero()[:, 0]
        order = torch.sort(slots[shown], stable=True)
        bounds = np.cumsum(torch.bincount(order.values, minlength=len(latents)).numpy())[:-1]
        entries = shown[order.indices]
        rows, values = self.tokens[entries].long().numpy(), self.acts[entries].numpy()
        return list(zip(np.split(rows, bounds), np.split(values, bounds)))


def _encode_all(
    encoders: Sequence[Encode], held_out: Iterator[Chunk], training: Iterator[Chunk], max_tokens: int
) -> Iterator[_Code]:
    known: list[tuple[Tensor, ...]] = []
    of_each: list[list[tuple[Tensor, ...]]] = [[] for _ in encoders]
    read = n_held_out = 0
    for split, chunks in (("held_out", held_out), ("train", training)):
        while read < max_tokens and (chunk := next(chunks, None)) is not None:
            if chunk.token_ids is None or chunk.position is None:
                raise DataError(
                    "snippets need activations with token_ids and position; these have none, as plain arrays do."
                )
            n_rows = min(len(chunk.group), max_tokens - read)
            if not n_rows:
                continue
            batch = {site: acts[:n_rows] for site, acts in chunk.acts.items()}
            for encode, parts in zip(encoders, of_each):
                with torch.no_grad():
                    tokens, latents, acts = active_entries(encode(batch))
                entries = (tokens + read).to("cpu", torch.int32), latents.to("cpu", torch.int32)
                parts.append((*entries, acts.to("cpu", torch.float32)))
            told = chunk.token_ids, chunk.group, chunk.position
            known.append(tuple(tensor[:n_rows].to("cpu", torch.int64) for tensor in told))
            read += n_rows
        n_held_out = read if split == "held_out" else n_held_out
    if not read:
        raise DataError("there is no token to collect snippets from: expected at least one chunk with rows.")
    ids, group, position = (torch.cat(column) for column in zip(*known))
    # a model input goes on where the next position of the same document follows, also from chunk to chunk
    follows = (group.diff() == 0) & (position.diff() == 1)
    begins = torch.cat([torch.tensor([0], dtype=torch.int64, device="cpu"), (~follows).nonzero()[:, 0] + 1]).numpy()
    lengths = np.diff(np.append(begins, read))
    start, stop = begins.repeat(lengths), (begins + lengths).repeat(lengths)
    while of_each:
        tokens, latents, acts = (torch.cat(column) for column in zip(*of_each.pop(0)))
        yield _Code(tokens, latents, acts, ids.numpy(), group.numpy(), start, stop, n_held_out)


def _spread(counts: Tensor, n_latents: int) -> list[int]:
    """Choose latents at evenly spaced ranks of density, so that rare and frequent ones are both seen."""
    active = (counts >= MIN_ACTIVE).nonzero()[:, 0]
    if len(active) == 0:
        active = counts.nonzero()[:, 0]
    ranked = active[torch.sort(counts[active], stable=True).indices]
    if len(ranked) > n_latents:
        # The middles of n_latents equal shares: neither the rarest nor the densest latent, which say little.
        ranked = ranked[
            (torch.arange(n_latents, dtype=torch.int64, device="cpu") * 2 + 1) * len(ranked) // (2 * n_latents)
        ]
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
    snippets = [
        _snippet(code, on_token, window, token_text) for window in _best_windows(code, rows, acts, per_latent, context)
    ]
    return _figures(code, latent, rows, acts, _top_tokens(code.token_ids[rows], acts, token_text), snippets)


def _figures(
    code: _Code,
    latent: int,
    rows: NDArray[np.int64],
    acts: NDArray[np.float32],
    top_tokens: list[str],
    snippets: Sequence[Snippet] = (),
    images: Sequence[Shaded] = (),
) -> LatentSnippets:
    """Return what is known of a latent: how often and how strongly it is active, beside what it is shown with."""
    max_act = float(acts[np.abs(acts).argmax()])
    low, high = min(0.0, float(acts.min())), max(0.0, float(acts.max()))
    return LatentSnippets(
        index=latent,
        density=len(rows) / len(code.token_ids),
        max_act=_short(max_act),
        mean_act=_short(float(acts.mean(dtype=np.float64))),
        top_tokens=top_tokens,
        histogram=np.histogram(acts, bins=HISTOGRAM_BINS, range=(low, high))[0].tolist(),
        snippets=list(snippets),
        images=list(images),
        least_act=_short(low if max_act > 0 else high),
    )


def _snippet(
    code: _Code, on_token: NDArray[np.float32], window: tuple[int, int, int], token_text: TokenText
) -> Snippet:
    """Return the text of a window (start, peak, stop), a little longer where that would cut a character."""
    start, peak, stop = window
    first, last = int(code.start[peak]), int(code.stop[peak])
    offset, tokens = stretch_strings(token_text, code.token_ids[first:last].tolist(), start - first, stop - first)
    begin = first + offset
    acts = [_short(act) for act in on_token[begin : begin + len(tokens)].tolist()]
    return Snippet(tokens, acts, peak - begin, "held_out" if peak < code.n_held_out else "train")


def _best_windows(
    code: _Code, rows: NDArray[np.int64], acts: NDArray[np.float32], per_latent: int, context: int
) -> list[tuple[int, int, int]]:
    """Return (start, peak, stop) of the highest peaks: one a document, no text twice, held-out ones first."""
    by_act = rows[np.argsort(-np.abs(acts), kind="stable")]
    by_act = by_act[np.argsort(by_act >= code.n_held_out, kind="stable")]
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
    peaks = dict(zip(rows.tolist(), np.abs(acts).tolist()))
    return sorted(windows, key=lambda window: -peaks[window[1]])


def _top_tokens(ids: NDArray[np.int64], acts: NDArray[np.float32], token_text: TokenText) -> list[str]:
    unique, where = np.unique(ids, return_inverse=True)
    total = np.bincount(where.reshape(-1), weights=np.abs(acts))
    texts: dict[str, None] = {}
    for i in np.argsort(-total, kind="stable")[: 3 * _TOP_TOKENS]:
        text = "".join(token_text([int(unique[i])]))
        texts.setdefault(text.strip() or text)
    return list(texts)[:_TOP_TOKENS]


def _short(value: float) -> float:
    return float(f"{value:.4g}")

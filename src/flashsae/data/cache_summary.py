"""What is in a cache of activations: its size and origin, and what its activations look like, by a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import INDEX_FILE, TOKENIZER_FOLDER, CacheIndex, load_tokens, shard_path, texts_of
from flashsae.data.stored import Layout
from flashsae.errors import FlashSAEError
from flashsae.metrics import OUTLIER_NORM_RATIO
from flashsae.settings.kinds import expand

OUTLIER_DIMENSION_RATIO = 6.0
"""A dimension whose root mean square is so many times the median over dimensions is called an outlier."""
_SAMPLE_ROWS = 1 << 16
_SAMPLE_NUMBERS = 1 << 25
_SAMPLE_SHARDS = 16
_RUN = 64
"""Neighbouring rows that are sampled together."""
_COUNTED_ROWS = 1 << 27
"""Documents are counted in no more rows than these, 2 GB of tokens."""
_GRAM_ROWS = 2048
_LISTED = 8


@dataclass(frozen=True)
class Positions:
    """Tokens at neighbouring positions of the inputs of the model.

    Args:
        first, last: of them.
        rows: of the sample.
        norm: median of ‖x‖.
        ratio: of it to the median over all positions.
    """

    first: int
    last: int
    rows: int
    norm: float
    ratio: float


@dataclass(frozen=True)
class OutlierDimension:
    """A dimension that is larger than others.

    Args:
        dimension: its number.
        ratio: of its root mean square to the median over dimensions.
        share: of Σ‖x‖².
        mean_share: of its own square that its mean has: near 1 where it is large and does not vary.
    """

    dimension: int
    ratio: float
    share: float
    mean_share: float


@dataclass(frozen=True)
class OutlierTokens:
    """Tokens whose norm exceeds `OUTLIER_NORM_RATIO` times the median.

    Args:
        rows: how many of the sample.
        share: of Σ‖x − mean‖².
        commonest: the commonest of them: token id, the token in words where the tokenizer can be read, and how often.
    """

    rows: int
    share: float
    commonest: list[tuple[int, str | None, int]]


@dataclass(frozen=True)
class Shape:
    """What the activations of a hookpoint look like, over the rows of a sample that are finite.

    Args:
        norm: median of ‖x‖; mean_norm, largest_norm: likewise.
        mean_share: ‖mean‖² as a fraction of the mean of ‖x‖².
        variance: of a token: the mean of ‖x − mean‖².
        effective_dimensions: (Σλ)²/Σλ² over the eigenvalues of the covariance; None of too few rows.
        constant_dimensions: how many dimensions do not vary.
        outlier_dimensions: the largest ones, at most 8, and how many there are in all.
        n_outlier_dimensions: in all.
        outlier_tokens: what there is of such.
        positions: norms by position; attention sinks stand out.
        rounds_away: what bfloat16 and int8 round away of the variance: by the index where the cache is stored so, or
            would be by the sample; what cannot be known is left out.
    """

    norm: float
    mean_norm: float
    largest_norm: float
    mean_share: float
    variance: float
    effective_dimensions: float | None
    constant_dimensions: int
    outlier_dimensions: list[OutlierDimension]
    n_outlier_dimensions: int
    outlier_tokens: OutlierTokens
    positions: list[Positions]
    rounds_away: dict[str, float]


@dataclass(frozen=True)
class SiteSummary:
    """A hookpoint of a cache.

    Args:
        hookpoint, width: its name and its number of dimensions.
        size: bytes on disk.
        sample_rows: rows that were looked at.
        not_finite_rows: how many of these hold NaN or Inf.
        shape: of the others; None if there are none.
    """

    hookpoint: str
    width: int
    size: int
    sample_rows: int
    not_finite_rows: int
    shape: Shape | None


@dataclass(frozen=True)
class CacheSummary:
    """A cache.

    Args:
        directory, is_complete: where it lies, and whether nothing is left to be written.
        rows, shards: tokens, and the files that they lie in.
        documents: how many there are; None where there are too many tokens to count them.
        size: bytes on disk, with the tokens and the tokenizer.
        dtype, compression: of what is stored.
        model, texts: what was read by what.
        settings: all that decided the bytes, by name.
        sites: by hookpoint.
    """

    directory: str
    is_complete: bool
    rows: int
    shards: int
    documents: int | None
    size: int
    dtype: str
    compression: str
    model: str
    texts: list[str]
    settings: dict[str, Any]
    sites: list[SiteSummary]


def summarise(directory: str | Path) -> CacheSummary:
    """Look at a cache, complete or not.

    Raises:
        CheckpointError: there is none, or it is damaged where it was looked at.
    Cost: reads the tokens, and of the activations no more than 16 shards of each hookpoint.
    """
    directory = expand(directory)
    index = CacheIndex.read(directory)
    names = list(index.settings["hookpoints"])
    cache = ActivationCache(directory, names, 0.0, must_be_complete=False)
    kinds = index.shards[0].crc32 if index.shards else {}
    files = [shard_path(directory, kind, number) for kind in kinds for number in range(len(index.shards))]
    files += [directory / INDEX_FILE, *(path for path in (directory / TOKENIZER_FOLDER).rglob("*") if path.is_file())]
    sample = _Sample(cache, index)
    return CacheSummary(
        directory=str(directory),
        is_complete=index.complete,
        rows=index.rows,
        shards=len(index.shards),
        documents=_count_documents(directory, index),
        size=sum(path.stat().st_size for path in files),
        dtype=index.settings["dtype"],
        compression=index.settings.get("cache_compression", "none"),
        model=index.settings["model"],
        texts=[text.dataset for text in texts_of(index)],
        settings=index.settings,
        sites=[sample.site(name) for name in names],
    )


def _count_documents(directory: Path, index: CacheIndex) -> int | None:
    if index.rows > _COUNTED_ROWS:
        return None
    groups = (load_tokens(directory, index, number)["group"].numpy() for number in range(len(index.shards)))
    return len(np.unique(np.concatenate([np.empty(0, np.int64), *map(np.unique, groups)])))


class _Sample:
    """Runs of neighbouring rows at equal distances, in shards at equal distances, and what is known of their tokens."""

    def __init__(self, cache: ActivationCache, index: CacheIndex) -> None:
        self._cache, self._index = cache, index
        self.width = max(index.settings["hookpoints"].values())
        shards = _spread(len(index.shards), _SAMPLE_SHARDS)
        starts = [0, *accumulate(shard.rows for shard in index.shards)]
        of_shard = max(_RUN, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // self.width) // max(len(shards), 1))
        rows, ids, positions = [], [], []
        for number in shards:
            runs = _spread(-(-index.shards[number].rows // _RUN), of_shard // _RUN)
            here = torch.cat(
                [torch.arange(run * _RUN, (run + 1) * _RUN, dtype=torch.int64, device="cpu") for run in runs]
            )
            here = here[here < index.shards[number].rows]
            tokens = load_tokens(cache.directory, index, number)
            rows.append(here + starts[number])
            ids.append(tokens["token_ids"][here])
            positions.append(tokens["position"][here])
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        self._rows, self._ids, self._positions = (torch.cat([empty, *each]) for each in (rows, ids, positions))

    def site(self, name: str) -> SiteSummary:
        """Look at the activations of a hookpoint."""
        cache = ActivationCache(self._cache.directory, name, 0.0, must_be_complete=False)
        x = cache.rows(self._rows)[name].float()
        is_finite = x.isfinite().all(1)
        shape = self._shape(name, x[is_finite], is_finite) if bool(is_finite.any()) else None
        bad = int((~is_finite).sum())
        return SiteSummary(name, x.shape[1], cache.stored_bytes, len(x), bad, shape)

    def _shape(self, name: str, x: Tensor, is_finite: Tensor) -> Shape:
        mean, square = x.mean(0, dtype=torch.float64), torch.stack(list(_squares(x))).sum(0) / len(x)
        centred = torch.stack(list(_squares(x, mean))).sum(0) / len(x)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        rms = square.sqrt()
        ratio = rms / rms.median() if rms.median() > 0 else torch.where(rms > 0, torch.inf, 0.0)
        outliers = (ratio > OUTLIER_DIMENSION_RATIO).nonzero()[:, 0]
        largest = outliers[ratio[outliers].argsort(descending=True, stable=True)][:_LISTED].tolist()
        norm, total = norms.median().item(), square.sum().item()
        return Shape(
            norm=norm,
            mean_norm=norms.mean().item(),
            largest_norm=norms.max().item(),
            mean_share=mean.square().sum().item() / total if total else 0.0,
            variance=centred.sum().item(),
            effective_dimensions=_effective_dimensions(x, mean),
            constant_dimensions=int((x.amax(0) == x.amin(0)).sum()),
            outlier_dimensions=[
                OutlierDimension(
                    each,
                    ratio[each].item(),
                    square[each].item() / total,
                    mean[each].item() ** 2 / square[each].item(),
                )
                for each in largest
            ],
            n_outlier_dimensions=len(outliers),
            outlier_tokens=self._outlier_tokens(x, mean, norms, self._ids[is_finite]),
            positions=_by_position(norms, self._positions[is_finite], norm),
            rounds_away=self._rounds_away(name, x, centred.sum().item()),
        )

    def _outlier_tokens(self, x: Tensor, mean: Tensor, norms: Tensor, ids: Tensor) -> OutlierTokens:
        large = norms > OUTLIER_NORM_RATIO * norms.median() if norms.median() > 0 else norms < 0
        variance = (x.double() - mean).square().sum(1)
        share = (variance[large].sum() / variance.sum()).item() if variance.sum() > 0 else 0.0
        commonest = Counter(ids[large].tolist()).most_common(_LISTED)
        tokenizer: Any = None
        if commonest:
            with suppress(FlashSAEError):  # it is not needed to look at numbers
                tokenizer = self._cache.read_tokenizer()
        words = [None if tokenizer is None else str(tokenizer.decode([token])) for token, _ in commonest]
        return OutlierTokens(int(large.sum()), share, [(t, word, n) for (t, n), word in zip(commonest, words)])

    def _rounds_away(self, name: str, x: Tensor, variance: float) -> dict[str, float]:
        stored = self._index.settings["dtype"]
        if stored == "int8":
            return {"int8": self._index.rounded_away(name)}
        layout = Layout(x.shape[1], "int8")
        lost = (x.double() - layout.restore(layout.store(x)).double()).square().sum().item() / len(x)
        would = 0.0 if not lost else lost / variance if variance else float("inf")
        return {"bfloat16": self._index.rounded_away(name), "int8": would}


def _spread(n: int, most: int) -> list[int]:
    """Return up to so many of the numbers below n, at equal distances."""
    return sorted({round(each) for each in np.linspace(0, n - 1, min(n, most)).tolist()})


def _squares(x: Tensor, mean: Tensor | None = None) -> Iterator[Tensor]:
    """Yield Σ(x − mean)² of each dimension, part by part, in float64."""
    for row in range(0, len(x), 4096):
        part = x[row : row + 4096].double()
        yield (part if mean is None else part - mean).square().sum(0)


def _effective_dimensions(x: Tensor, mean: Tensor) -> float | None:
    """Return (Σλ)²/Σλ² of the covariance, without the bias of a sample: Σλ² from pairs of different rows."""
    sample = x[torch.tensor(_spread(len(x), _GRAM_ROWS), dtype=torch.int64, device="cpu")].double() - mean
    if len(sample) < _RUN:
        return None
    gram = sample @ sample.T
    own, n = gram.diagonal(), len(sample)
    squares = (gram.square().sum() - own.square().sum()).item() / (n * (n - 1))
    return min(own.mean().item() ** 2 / squares, float(x.shape[1])) if squares > 0 else None


def _by_position(norms: Tensor, positions: Tensor, norm: float) -> list[Positions]:
    """Return the norms at the first four positions, and at as many as lie before them from there on."""
    found, first, width = list[Positions](), 0, 1
    while first <= int(positions.max()):
        here = norms[(positions >= first) & (positions < first + width)]
        if len(here):
            median = here.median().item()
            found.append(Positions(first, first + width - 1, len(here), median, median / norm if norm else 1.0))
        first += width
        width = 1 if first < 4 else first
    return found

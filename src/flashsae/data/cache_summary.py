"""What is in a cache of activations: its size and origin, and what its activations look like, by a sample."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.data.acts_shape import Shape, shape_of, spread_over
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import (
    INDEX_FILE,
    TOKENIZER_FOLDER,
    CacheIndex,
    index_in,
    load_tokens,
    shard_path,
    texts_of,
)
from flashsae.data.stored import Layout
from flashsae.errors import FlashSAEError
from flashsae.settings.kinds import expand

_SAMPLE_ROWS = 1 << 16
_SAMPLE_NUMBERS = 1 << 25
_SAMPLE_SHARDS = 16
_RUN = 64
"""Neighbouring rows that are sampled together."""
_COUNTED_ROWS = 1 << 27
"""Documents are counted in no more rows than these, 2 GB of tokens."""


@dataclass(frozen=True)
class SiteSummary:
    """A hookpoint of a cache.

    Args:
        hookpoint, width: its name and its number of dimensions.
        size: bytes on disk.
        sample_rows: rows that were looked at.
        not_finite_rows: how many of these hold NaN or Inf.
        shape: what the others look like; None if there are none.
        rounds_away: what bfloat16 and int8 round away of the variance: by the index where the cache is stored so, or
            would be by the sample; what cannot be known is left out.
        words: of the commonest outlier tokens, by id, where the tokenizer can be read.
    """

    hookpoint: str
    width: int
    size: int
    sample_rows: int
    not_finite_rows: int
    shape: Shape | None
    rounds_away: dict[str, float]
    words: dict[int, str]


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
    index = index_in(directory)
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
        self._tokenizer: Any = None
        self.width = max(index.settings["hookpoints"].values())
        shards = spread_over(len(index.shards), _SAMPLE_SHARDS)
        starts = [0, *accumulate(shard.rows for shard in index.shards)]
        of_shard = max(_RUN, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // self.width) // max(len(shards), 1))
        rows, ids, positions = [], [], []
        for number in shards:
            runs = spread_over(-(-index.shards[number].rows // _RUN), of_shard // _RUN)
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
        kept = x[is_finite]
        shape = shape_of(kept, self._ids[is_finite], self._positions[is_finite]) if len(kept) else None
        return SiteSummary(
            hookpoint=name,
            width=x.shape[1],
            size=cache.stored_bytes,
            sample_rows=len(x),
            not_finite_rows=len(x) - len(kept),
            shape=shape,
            rounds_away={} if shape is None else self._rounds_away(name, kept, shape.variance),
            words={} if shape is None else self._words(token for token, _ in shape.outlier_tokens.commonest),
        )

    def _words(self, tokens: Iterable[int]) -> dict[int, str]:
        """Return tokens as text, none where the tokenizer cannot be read, which is not needed to look at numbers."""
        wanted = list(tokens)
        if self._tokenizer is None and wanted:
            with suppress(FlashSAEError):
                self._tokenizer = self._cache.read_tokenizer()
        return {} if self._tokenizer is None else {token: str(self._tokenizer.decode([token])) for token in wanted}

    def _rounds_away(self, name: str, x: Tensor, variance: float) -> dict[str, float]:
        stored = self._index.settings["dtype"]
        if stored == "int8":
            return {"int8": self._index.rounded_away(name)}
        layout = Layout(x.shape[1], "int8")
        lost = (x.double() - layout.restore(layout.store(x)).double()).square().sum().item() / len(x)
        would = 0.0 if not lost else lost / variance if variance else float("inf")
        return {"bfloat16": self._index.rounded_away(name), "int8": would}

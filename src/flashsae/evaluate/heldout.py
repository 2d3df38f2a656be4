"""Measure an SAE on tokens that training never saw, and describe its latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from warnings import warn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae import ops
from flashsae.architecture.sites import read_and_written
from flashsae.data.acts import Acts, Batch, X, acts_by_site, batch_acts, check_finite, iterate
from flashsae.data.sources import RowSource, Source
from flashsae.errors import ConfigError, DataError, DtypeError, FlashSAEWarning
from flashsae.metrics import FVU, LatentActivity, norm_limit
from flashsae.neutral import neutral
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.sae.step import in_order, join_sites

NORM_TOKENS = 8192
"""Tokens whose median norm says which are outliers."""

_AT_ONCE = 4096
_COSINE_ROWS = 1024
_READ_ROWS = 8192
_NONE = torch.zeros(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Evaluation:
    """Figures of an SAE on some tokens.

    Args:
        fvu: Σ‖x − x_hat‖² / Σ‖x − mean x‖² over all of them, in float64, of x as it was given.
        l0: mean number of active latents (value other than 0) a token.
        tokens: how many tokens.
        latent_density: [d_sae], float64, fraction of the tokens on which each latent is active.
        fvu_without_outliers: fvu over the other tokens, and about their mean. Where a few tokens of huge norm hold most
            of the variance, fvu is about them, and this about the rest.
        outliers: tokens whose norm exceeds 10 times the median norm of the first 8192 tokens (of an array or a larger
            batch: of up to as many at equal distances).
        site_fvu: the fvu of each site alone, by name, of an SAE that reconstructs several.
    """

    fvu: float
    l0: float
    tokens: int
    latent_density: Tensor = field(repr=False)  # thousands of numbers
    fvu_without_outliers: float
    outliers: int
    site_fvu: Mapping[str, float] = field(default_factory=dict)


@neutral()
@torch.no_grad()
def evaluate(
    sae: SAE,
    x: Tensor | np.ndarray | Acts | Iterable[Tensor | np.ndarray | Acts],
    *,
    batch_tokens: int = _AT_ONCE,
) -> Evaluation:
    """Measure an SAE, as it is in inference.

    Only what the SAE reads is rounded to its dtype; x_hat is compared with x as it was given.

    Args:
        sae: on any device.
        x: anything that `flashsae.fit` takes, [tokens, d_in] in all; held-out tokens, if the figures are to mean
            anything. For an SAE of several sites {site: [tokens, d]} in their order, or an iterable of such: figures
            are of what it writes.
        batch_tokens: tokens encoded at once.
    Raises:
        DataError: there are no tokens, or one holds NaN, Inf, or more than float32 does.
        ShapeError, DtypeError: x does not fit the SAE.
    Warns:
        FlashSAEWarning: codes have a capacity, and it was too small.
    """
    _check_sae(sae)
    if isinstance(batch_tokens, bool) or not hasattr(batch_tokens, "__index__") or batch_tokens < 1:
        raise ConfigError(f"batch_tokens: expected a positive int, got {batch_tokens!r}.")
    first, batches = _begin(x, sae.config)
    measuring = _Measuring(sae, first)
    with inference(sae):
        for batch in batches:
            measuring.update(batch, int(batch_tokens))
    return measuring.evaluation()


@neutral()
@torch.no_grad()
def evaluate_together(
    saes: Sequence[SAE], sites: Sequence[Sequence[str]], batches: Iterable[Batch]
) -> list[Evaluation]:
    """Measure several SAEs in one reading of some tokens, each as `evaluate` does.

    Args:
        saes: on any device.
        sites: of each, those of its activations, in its order.
        batches: [n, d] by site, those of all SAEs.
    Raises, Warns:
        as `evaluate`.
    """
    reading, first = iter(batches), list[Batch]()
    while sum(len(next(iter(batch.values()))) for batch in first) < NORM_TOKENS:
        batch = next(reading, None)
        if batch is None:
            break
        first.append(batch)

    def own(number: int, batch: Batch) -> _Pair:
        return _pair({site: batch[site] for site in sites[number]}, saes[number].config)

    measuring = [_Measuring(sae, [own(number, batch) for batch in first]) for number, sae in enumerate(saes)]
    with ExitStack() as stack:
        for sae in saes:
            stack.enter_context(inference(sae))
        for batch in chain(first, reading):
            for number, each in enumerate(measuring):
                each.update(own(number, batch), _AT_ONCE)
    return [each.evaluation() for each in measuring]


class _Measuring:
    """The figures of an SAE, while tokens are read.

    Args:
        sae: in inference.
        first: tokens to know the usual norm from.
    """

    def __init__(self, sae: SAE, first: Sequence[_Pair]) -> None:
        self._sae = sae
        norms = [_norms(target[:: 1 + len(target) // NORM_TOKENS]) for _, target in first]
        self._limit = norm_limit(torch.cat(norms or [_NONE]))
        self._of_sites = {site: (columns, FVU()) for site, columns in sae.config.columns.items()}
        self._fvu, self._activity = FVU(), LatentActivity(sae.config.d_sae, sae.W_dec.device)
        self._others, self._outliers, self._left_out = self._fvu, 0, 0

    def update(self, batch: _Pair, batch_tokens: int) -> None:
        """Measure on some tokens, so many at once."""
        sae = self._sae
        for part, target in _split(batch, batch_tokens):
            check_finite(part, "x")
            seen = part.to(sae.W_dec.device, sae.W_dec.dtype)
            code = sae.encode(seen)
            self._activity.update(code)
            self._left_out += 0 if code.pattern.left_out is None else int(code.pattern.left_out)
            if target is not part:
                check_finite(target, "x")
            target, x_hat = target.to(sae.W_dec.device), sae.decode(code, like=seen)
            is_outlier = _norms(target) > self._limit
            if self._others is self._fvu and bool(is_outlier.any()):
                self._others = copy(self._fvu)
            self._fvu.update(target, x_hat)
            for columns, of_site in self._of_sites.values():
                of_site.update(target[:, columns], x_hat[:, columns])
            if self._others is not self._fvu:
                self._others.update(target[~is_outlier], x_hat[~is_outlier])
                self._outliers += int(is_outlier.sum())

    def evaluation(self) -> Evaluation:
        """Return the figures of all tokens so far."""
        activity = self._activity
        if activity.tokens == 0:
            raise DataError(
                "x is empty: expected at least one token to evaluate on. Give more data or a larger held_out."
            )
        if self._left_out:
            warn(
                f"{self._left_out:,} entries of the code found no place and were left out, so the figures are of less "
                f"than the SAE selects: in inference, let {self._sae.architecture.title} encode without a capacity.",
                FlashSAEWarning,
                stacklevel=3,
            )
        density = activity.latent_density().cpu()
        by_site = {site: of_site.compute() for site, (_, of_site) in self._of_sites.items()}
        others = self._others.compute()
        return Evaluation(self._fvu.compute(), activity.l0(), activity.tokens, density, others, self._outliers, by_site)


@contextmanager
def inference(sae: SAE) -> Iterator[None]:
    """Let the SAE encode as in inference within the body, where its code of a token does not depend on the others."""
    was_training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(was_training)


def _check_sae(sae: object) -> None:
    if not isinstance(getattr(sae, "config", None), SAEConfig):  # also one that torch.compile has wrapped
        raise DtypeError(f"sae: expected a flashsae.SAE, got {type(sae).__name__}.")


_Pair = tuple[Tensor, Tensor]
"""What an SAE reads and what it is to reconstruct, [n, d_in] and [n, d_out]: the same tensor for an autoencoder."""


def _begin(x: Any, config: SAEConfig) -> tuple[list[_Pair], Iterator[_Pair]]:
    """Return tokens to know the usual norm from, and all batches from the first."""

    if isinstance(x, Tensor | np.ndarray | Mapping):
        acts = [_pair(x, config, "x")]
        return acts, iter(acts)
    batches = (_pair(batch, config) for batch in iterate(x))
    first: list[_Pair] = []
    while sum(len(target) for _, target in first) < NORM_TOKENS:
        batch = next(batches, None)
        if batch is None:
            break
        first.append(batch)
    return first, chain(first, batches)


def _pair(batch: Any, config: SAEConfig, what: str = "a batch of x") -> _Pair:
    architecture = config.architecture
    if len(architecture.sites) == 1:
        return join_sites(architecture, {X: batch_acts(batch, what)})
    by_site = batch if isinstance(batch, Mapping) else {X: batch}
    read_and_written(architecture, by_site, "evaluate(sae, {})", list(config.columns))
    return join_sites(architecture, in_order(config, acts_by_site(by_site, what)))


def _split(batch: _Pair, tokens: int) -> Iterator[_Pair]:
    """Cut a batch into parts of so many tokens."""
    part, target = batch
    if part is target:
        return ((each, each) for each in torch.split(part, tokens))
    return zip(torch.split(part, tokens), torch.split(target, tokens))


def _norms(x: Tensor) -> Tensor:
    """Return the norm of each token: [B], float64."""
    norms: Tensor = x.double().norm(dim=1)
    return norms


def held_out_batches(source: Source, max_tokens: int) -> Iterator[Batch]:
    """Yield held-out activations of a source, [n, d] by site, `max_tokens` in all at most; the same in every call.

    Where any row can be read, they lie at equal distances in all that is held out, and so do those of each batch. A
    stream gives the first ones; its documents come shuffled.
    """
    if isinstance(source, RowSource):
        rows = source.split_rows("held_out")
        tokens = min(max_tokens, len(rows))
        rows = rows[torch.arange(tokens, dtype=torch.int64, device="cpu") * len(rows) // max(tokens, 1)]
        batches = -(-tokens // _READ_ROWS)
        yield from (source.rows(rows[start::batches]) for start in range(batches))
        return
    left = max_tokens
    for chunk, _ in source.chunks("held_out"):
        n_rows = min(left, len(chunk.group))
        left -= n_rows
        if n_rows:
            yield {site: acts[:n_rows] for site, acts in chunk.acts.items()}
        if left == 0:
            return


@neutral()
@torch.no_grad()
def latent_geometry(sae: SAE) -> dict[str, Tensor]:
    """Describe the directions of an SAE.

    Returns:
        decoder_norm: norm of each row of W_dec.
        encoder_decoder_cosine: cosine between a latent's rows of W_enc_T and W_dec; only where both are of one width.
        nearest_decoder_cosine: largest cosine of its row of W_dec with that of another latent.
        site_norms: [d_sae, sites], norms of its row of W_dec at each of several sites, in the unit that each site was
            trained in; only where there are several.
        All [d_sae] else, float32, on the CPU.
    Cost: 2·d_sae²·d_in FLOPs; 1024 x d_sae values in memory at once.
    """
    _check_sae(sae)
    rows = F.normalize(sae.W_dec.float(), dim=1)
    nearest = torch.full((len(rows),), -1.0, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _COSINE_ROWS):
        cosines = rows[start : start + _COSINE_ROWS] @ rows.T
        own = torch.arange(len(cosines), dtype=torch.int64, device=rows.device)
        cosines[own, start + own] = -1.0
        nearest[start : start + _COSINE_ROWS] = cosines.amax(1)
    geometry = {"decoder_norm": sae.W_dec.float().norm(dim=1).cpu(), "nearest_decoder_cosine": nearest.cpu()}
    if sae.W_enc_T.shape == sae.W_dec.shape:
        geometry["encoder_decoder_cosine"] = F.cosine_similarity(sae.W_enc_T.float(), sae.W_dec.float()).cpu()
    if sae.config.columns:
        norms, scale = ops.block_norms(sae.W_dec, sae.config.arch.widths).float(), getattr(sae, "site_scale", None)
        if scale is not None:  # columns of a site have one scale, which makes them what they were in training
            norms = norms * scale[[columns.start for columns in sae.config.columns.values()]].float()
        geometry["site_norms"] = norms.cpu()
    return geometry

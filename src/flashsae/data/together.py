"""Batches for several SAEs at once: every activation is computed, read and moved once, whoever trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashsae.data.acts import Batch
from flashsae.data.batches import ADVICE, PLACE, Batches, OnFill, State
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import RowSource, Source
from flashsae.data.tee import Tee
from flashsae.errors import CheckpointError
from flashsae.files.schema import parse


@dataclass(frozen=True)
class _Places:
    """Of each order, by its seed."""

    orders: dict[str, dict[str, Any]]


class Together:
    """The batches of several SAEs as one: all sites of the tokens of a step, for each order of the data that is asked.

    A seed decides the order of the data of an SAE. SAEs of one seed share their batch, and each gets the tokens that
    it would get alone. A stream is read once for all seeds, through a shuffle buffer for each.

    Args:
        source: has the sites of all SAEs.
        batch_tokens: rows in a batch.
        seeds: of the orders.
        buffer_tokens: rows that are mixed with each other.
        tokens: rows that will be trained on, if that is known.
    """

    def __init__(
        self, source: Source, batch_tokens: int, *, seeds: Sequence[int], buffer_tokens: int, tokens: int | None = None
    ) -> None:
        seeds = list(dict.fromkeys(seeds))
        tee = None if isinstance(source, RowSource) or len(seeds) == 1 else Tee(source, len(seeds))
        self._orders: dict[int, Batches] = {
            seed: shuffled(
                source if tee is None else tee.reader(number),
                batch_tokens,
                seed=seed,
                buffer_tokens=buffer_tokens,
                tokens=tokens,
            )
            for number, seed in enumerate(seeds)
        }
        self._samples: dict[tuple[int, int], Batch] = {}

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens of an epoch; None as long as no epoch has been seen to its end."""
        return next(iter(self._orders.values())).epoch_tokens

    def next_batch(self) -> Batch:
        """Return the next batch of every order: [batch_tokens, d] by `site_in`."""
        self._samples.clear()
        batches = {seed: batches.next_batch() for seed, batches in self._orders.items()}
        return {self.site_in(seed, site): acts for seed, batch in batches.items() for site, acts in batch.items()}

    def site_in(self, seed: int, site: str) -> str:
        """Return what a site of the order of a seed is called in a batch."""
        return site if len(self._orders) == 1 else f"{seed}/{site}"

    def sample(self, tokens: int, on_fill: OnFill | None = None, seed: int | None = None) -> Batch:
        """Return training rows of an order, by default the first, as `Batches` has it; read once for all SAEs."""
        seed = next(iter(self._orders)) if seed is None else seed
        if (seed, tokens) not in self._samples:
            self._samples = {(seed, tokens): self._orders[seed].sample(tokens, on_fill)}
        return self._samples[seed, tokens]

    def state(self) -> State:
        """Return the place of every order."""
        states = {seed: batches.state() for seed, batches in self._orders.items()}
        tensors = {f"{seed}.{name}": tensor for seed, (_, held) in states.items() for name, tensor in held.items()}
        return {"orders": {str(seed): place for seed, (place, _) in states.items()}}, tensors

    def restore(self, state: State) -> None:
        """Resume where the state was taken; CheckpointError if the source or the seeds are others now."""
        orders = parse(_Places, state[0], PLACE, ADVICE).orders
        if set(orders) != set(map(str, self._orders)):
            raise CheckpointError(
                f"{PLACE} is that of the seeds {', '.join(orders)}, and the run has {', '.join(map(str, self._orders))}"
                f" now. {ADVICE}"
            )
        for seed, batches in self._orders.items():
            prefix = f"{seed}."
            tensors = {name.removeprefix(prefix): t for name, t in state[1].items() if name.startswith(prefix)}
            batches.restore((orders[str(seed)], tensors))

    def view(self, seed: int, sites: Sequence[str]) -> View:
        """Return what one SAE reads.

        Args:
            seed: of its training.
            sites: in the order in which its architecture names them.
        """
        return View(self, seed, tuple(sites))


class View:
    """What one SAE reads of the batches of several: `Batches`, whose place in the data is saved once for all."""

    def __init__(self, together: Together, seed: int, sites: tuple[str, ...]) -> None:
        self._together, self._seed, self._sites = together, seed, sites

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens of an epoch; None as long as no epoch has been seen to its end."""
        return self._together.epoch_tokens

    def of(self, batch: Batch) -> Batch:
        """Return its own part of a batch of all, which may have been moved to a device."""
        return {site: batch[self._together.site_in(self._seed, site)] for site in self._sites}

    def next_batch(self) -> Batch:
        """Return the next batch, of which the others get nothing any more: for one that reads alone."""
        return self.of(self._together.next_batch())

    def sample(self, tokens: int, on_fill: OnFill | None = None) -> Batch:
        """Return training rows, without moving on."""
        rows = self._together.sample(tokens, on_fill, self._seed)
        return {site: rows[site] for site in self._sites}

    def state(self) -> State:
        """Return nothing: the place is that of all."""
        return {}, {}

    def restore(self, state: State) -> None:
        """Do nothing: all go on together."""


def widths_of(source: Source, sites: Sequence[str]) -> Mapping[str, int]:
    """Return the widths of some sites of a source, in their order."""
    return {site: source.widths[site] for site in sites}

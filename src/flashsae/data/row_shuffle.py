"""Shuffled batches of rows that can be read in any order, such as arrays and caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsae.data.acts import Batch, is_finite, what_is_not_finite
from flashsae.data.batches import ADVICE, PLACE, OnFill, State, check_identity, generator_of
from flashsae.data.sources import RowSource, announce, identity_of
from flashsae.errors import CheckpointError, DataError
from flashsae.files.schema import Count, parse

WINDOW_ROWS = 1 << 18
"""Rows that are permuted together, unless another number is asked for."""


@dataclass(frozen=True)
class _RowPlace:
    epoch: Count
    window: Count
    offset: Count
    rows: Count
    source: dict[str, Any] = field(default_factory=dict)


class RowShuffle:
    """Every row once an epoch, in an order that is a function of the seed: the state is three numbers.

    Blocks of neighbouring rows are permuted, some of them together make a window, and the rows of a window are
    permuted: reads from a disk stay in blocks, memory in one window.

    Args:
        source: read at random rows.
        batch_tokens: rows in a batch.
        seed: of the order.
        window_rows: rows permuted together. If the source has no more, every order of all rows is possible.
        block_rows: neighbouring rows read together.
    """

    def __init__(
        self, source: RowSource, batch_tokens: int, *, seed: int, window_rows: int = WINDOW_ROWS, block_rows: int = 64
    ) -> None:
        self._source = source
        self._identity = identity_of(source)  # now: it may take a while, or fail
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._rows = source.split_rows("train")
        if len(self._rows) == 0:
            raise DataError(f"{source.name}: no row is left for training. Give more data or a smaller held_out.")
        if len(self._rows) < batch_tokens:
            raise DataError(
                f"{source.name} has {len(self._rows)} rows for training, fewer than a batch of {batch_tokens}. "
                "Give more data or a smaller batch_tokens."
            )
        self._block_rows = block_rows if len(self._rows) > window_rows else 1
        self._blocks_per_window = max(1, window_rows // self._block_rows)
        self.epoch_tokens: int | None = len(self._rows)
        self._epoch, self._window, self._offset = 0, 0, 0
        self._order = self._window_rows()

    def _window_rows(self) -> Tensor:
        """Return the row numbers of the current window in order: [n], int64."""
        n_blocks = -(-len(self._rows) // self._block_rows)
        blocks = torch.randperm(
            n_blocks, generator=generator_of(self._seed, self._epoch), dtype=torch.int64, device="cpu"
        )
        blocks = blocks[self._window * self._blocks_per_window :][: self._blocks_per_window]
        places = (
            blocks[:, None] * self._block_rows + torch.arange(self._block_rows, dtype=torch.int64, device="cpu")
        ).flatten()
        places = places[places < len(self._rows)]
        mixed = torch.randperm(
            len(places), generator=generator_of(self._seed, self._epoch, self._window), dtype=torch.int64, device="cpu"
        )
        rows = self._rows[places[mixed]]
        announce(self._source, rows, self)
        return rows

    def _advance(self) -> None:
        self._window, self._offset = self._window + 1, 0
        if self._window * self._blocks_per_window * self._block_rows >= len(self._rows):
            self._epoch, self._window = self._epoch + 1, 0
        self._order = self._window_rows()

    def next_batch(self) -> Batch:
        """Return the next batch; an epoch ends inside a batch if it must."""
        pieces, missing = [], self._batch_tokens
        while missing:
            if self._offset == len(self._order):
                self._advance()
            piece = self._order[self._offset : self._offset + missing]
            self._offset += len(piece)
            missing -= len(piece)
            pieces.append(piece)
        index = torch.cat(pieces)
        batch = self._source.rows(index)
        _check_rows(batch, index, self._source.name)
        return batch

    def sample(self, tokens: int, on_fill: OnFill | None = None) -> Batch:
        """Return up to `tokens` training rows at equal distances; there is no buffer to be filled."""
        stride = max(1, len(self._rows) // tokens)
        index = self._rows[::stride][:tokens]
        rows = self._source.rows(index)
        _check_rows(rows, index, self._source.name)
        return rows

    def state(self) -> State:
        """Return the place in the order."""
        place = {"epoch": self._epoch, "window": self._window, "offset": self._offset, "rows": len(self._rows)}
        return {**place, "source": self._identity}, {}

    def restore(self, state: State) -> None:
        """Go on at a place; raises CheckpointError if the source is another, or has another number of rows now."""
        saved = state[0]
        if saved.get("rows", len(self._rows)) != len(self._rows):
            raise CheckpointError(
                f"{self._source.name} has {len(self._rows)} training rows now, {saved['rows']} when the checkpoint was "
                "written. Resume with the same data, or start a new run."
            )
        check_identity(self._source.name, self._identity, saved)
        place = parse(_RowPlace, saved, PLACE, ADVICE)
        self._epoch, self._window, self._offset = place.epoch, place.window, place.offset
        self._order = self._window_rows()
        if self._offset > len(self._order) or not len(self._order):
            raise CheckpointError(
                f"{PLACE} is damaged: there is no row {self._offset} of window {self._window}. {ADVICE}"
            )


def _check_rows(batch: Batch, index: Tensor, name: str) -> None:
    """Raise DataError naming the row of the source that holds NaN or Inf."""
    for site, acts in batch.items():
        if not is_finite(acts):
            bad = index[~torch.isfinite(acts.float()).all(dim=1).cpu()]
            where = "" if len(batch) == 1 else f" of {site}"
            raise DataError(
                f"{name}: row {int(bad[0])}{where} holds {what_is_not_finite(acts)} ({len(bad)} such rows in this "
                "batch). Find out where they come from, or drop those rows, and start again."
            )

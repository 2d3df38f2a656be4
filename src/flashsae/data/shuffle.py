"""From a source to shuffled batches, with bounded memory and a state that resumes bit for bit."""

from __future__ import annotations

from flashsae.data.batches import Batches as Batches
from flashsae.data.batches import OnFill as OnFill
from flashsae.data.buffer_shuffle import BufferShuffle as BufferShuffle
from flashsae.data.buffer_shuffle import buffer_size as buffer_size
from flashsae.data.row_shuffle import RowShuffle as RowShuffle
from flashsae.data.sources import RowSource, StreamSource


def shuffled(
    source: StreamSource | RowSource, batch_tokens: int, *, seed: int, buffer_tokens: int, tokens: int | None = None
) -> Batches:
    """Return shuffled batches of the train split of a source.

    Args:
        source: a RowSource is read in random order, any other through a shuffle buffer.
        batch_tokens: rows in a batch.
        seed: of the order.
        buffer_tokens: rows that are mixed with each other.
        tokens: rows that will be trained on, if that is known: a shuffle buffer holds no more (`buffer_size`).
    """
    if isinstance(source, RowSource):
        return RowShuffle(source, batch_tokens, seed=seed, window_rows=buffer_tokens)
    return BufferShuffle(source, batch_tokens, seed=seed, buffer_tokens=buffer_tokens, tokens=tokens)

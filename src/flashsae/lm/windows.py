"""From documents to model inputs: token windows with their special tokens, batched by length and padded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.lm.cutting import AGAIN, SPECIAL, TEXT, Cutter, Layout
from flashsae.lm.encoding import Encoded, Encoder
from flashsae.lm.framing import PROBE, encode, framing_of
from flashsae.lm.loading import special_ids
from flashsae.lm.tally import REASONS, Tally, inputs_in_words
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block


@dataclass(frozen=True)
class TokenBatch:
    """Windows padded on the right: what one forward reads. All [sequences, length].

    Args:
        ids: int64, token ids.
        attention: int64, 1 at tokens and 0 at padding.
        keep: bool, which tokens become rows of activations.
        documents: int64, the number of the document that a token comes from.
        order: [sequences], int64, the place of each window in the reading order of its block.
    """

    ids: Tensor
    attention: Tensor
    keep: Tensor
    documents: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Inputs:
    """The windows of a block.

    Args:
        layout: their tokens.
        numbers: [n], int64, the number of the document of each.
        why: [n], int64, 0 where a token makes a row, else one more than the place of the reason in REASONS.
    """

    layout: Layout
    numbers: np.ndarray
    why: np.ndarray


class Windows:
    """Cut documents into model inputs the way the tokenizer wants them, and batch these.

    Args:
        tokenizer: of the model, from transformers.
        config: how long windows and batches are, how windows begin, and which of their tokens become rows of
            activations. Filled.
        vocabulary: how many ids the model knows, if it says so.
        part_of: called with the number of a document; documents of different parts are never packed together.
    Raises:
        ConfigError: the special tokens leave no room in a window, no token is left to be kept, there is no BOS token
            to prepend, or the tokenizer is none that text can be cut for.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: ReadingConfig,
        vocabulary: int | None = None,
        part_of: Callable[[int], Hashable] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._part_of = part_of
        special = special_ids(tokenizer)
        self._special = np.array(sorted(special), dtype=np.int64)
        self._excluded = np.array(config.exclude_ids, dtype=np.int64)
        pad = tokenizer.pad_token_id or 0
        self.pad_token = (
            pad if vocabulary is None or pad < vocabulary else 0
        )  # some add a padding token to the tokenizer alone
        self.framing = framing_of(tokenizer, config)
        self._check()
        self._encode = Encoder(
            tokenizer,
            self.framing,
            special,
            vocabulary,
            assistant_only=config.assistant_only,
            is_packed=config.pack,
        )
        self._cutter = Cutter(self.framing, config.context_length, config.overlap)

    def _check(self) -> None:
        """Raise ConfigError where the settings leave no token."""
        config = self._config
        content = self.framing.content(config.context_length)
        if content < 1:
            raise ConfigError(
                f"context_length: expected more than the {config.context_length - content} special tokens that the "
                f"tokenizer adds to an input, got {config.context_length}."
            )
        if config.overlap >= content:
            raise ConfigError(
                f"overlap: expected fewer than {content}, the tokens of an input without special ones, got "
                f"{config.overlap}."
            )
        end = config.context_length - (len(self.framing.suffix) if config.mask_special else 0)
        if config.skip_first >= end:
            raise ConfigError(
                f"skip_first: expected fewer than {end}, the tokens of an input without special ones at its end, got "
                f"{config.skip_first}."
            )
        unknown = [token for token in config.exclude_ids if not 0 <= token < len(self._tokenizer)]
        if unknown:
            raise ConfigError(
                f"exclude_ids: the tokenizer has the ids 0 to {len(self._tokenizer) - 1}, got {unknown[0]}."
            )

    def probe(self) -> TokenBatch:
        """Return two windows of full length to learn shapes and limits from, of the same tokens in another order."""
        bare = encode(self._tokenizer, [PROBE])[0]
        size = self.framing.content(self._config.context_length)
        content = (bare * (size // len(bare) + 1))[:size]
        both = [Encoded(np.array(ids, dtype=np.int64), None) for ids in (content, content[1:] + content[:1])]
        return self._batch(self._judged(self._cutter.cut(both, None), [0, 0]), [0, 1])

    def batches(self, block: Block) -> list[TokenBatch]:
        """Batch the windows of a block of (number, document) by length, in an order that has nothing to do with it.

        Rows of a batch stand in reading order.
        """
        inputs = self._inputs(block)
        batches = [self._batch(inputs, places) for places in self._of_like_length(inputs.layout.length)]
        # whoever stops in the middle of a block has read windows of all lengths
        generator = torch.Generator().manual_seed(block[0][0] if block else 0)
        return [
            batches[i]
            for i in torch.randperm(len(batches), generator=generator, dtype=torch.int64, device="cpu").tolist()
        ]

    def tally(self, block: Block) -> Tally:
        """Count what becomes of the tokens of a block."""
        inputs = self._inputs(block)
        length = inputs.layout.length
        counts = np.bincount(inputs.why, minlength=len(REASONS) + 1).tolist()
        read = sum(len(places) * int(length[places].max()) for places in self._of_like_length(length))
        n_tokens = int(length.sum())
        return Tally(len(block), n_tokens, dict(zip(REASONS, counts[1:])), read - n_tokens)

    def __str__(self) -> str:
        """Say what the inputs of the model are."""
        return inputs_in_words(self._config.of_tokens(), self.framing, self._tokenizer)

    def _of_like_length(self, length: np.ndarray) -> Iterator[list[int]]:
        """Yield the places of the windows of each batch."""
        by_length = np.argsort(-length, kind="stable").tolist()
        while by_length:
            n_fit = self._config.forward_tokens // int(length[by_length[0]])
            yield sorted(by_length[:n_fit])
            del by_length[:n_fit]

    def _inputs(self, block: Block) -> _Inputs:
        numbers = [number for number, _ in block]
        parts: dict[Hashable, list[int]] = {}
        for place, number in enumerate(numbers if self._config.pack else ()):
            parts.setdefault(self._part_of and self._part_of(number), []).append(place)
        layout = self._cutter.cut(self._encode(block), list(parts.values()) if self._config.pack else None)
        return self._judged(layout, numbers)

    def _judged(self, layout: Layout, numbers: list[int]) -> _Inputs:
        """Say of each token whether it makes a row, and why it does not."""
        config = self._config
        is_special = (layout.kind == SPECIAL) | np.isin(layout.ids, self._special)
        holds = (
            is_special & config.mask_special,
            layout.kind == AGAIN,
            (layout.kind == TEXT) & ~layout.wanted,
            layout.position < config.skip_first,
            np.isin(layout.ids, self._excluded),
        )
        why = np.select(holds, range(1, len(holds) + 1), 0)
        return _Inputs(layout, np.array(numbers, dtype=np.int64)[layout.document], why)

    def _batch(self, inputs: _Inputs, places: list[int]) -> TokenBatch:
        start, length = inputs.layout.start[places, None], inputs.layout.length[places, None]
        position = np.arange(length.max())
        is_token = position < length
        token = start + np.minimum(position, length - 1)  # padding counts as what the last token counts as
        return TokenBatch(
            torch.from_numpy(np.where(is_token, inputs.layout.ids[token], self.pad_token)),
            torch.from_numpy(is_token.astype(np.int64)),
            torch.from_numpy(is_token & (inputs.why[token] == 0)),
            torch.from_numpy(inputs.numbers[token]),
            torch.tensor(places, dtype=torch.int64, device="cpu"),
        )


def positions_in_documents(batch: TokenBatch) -> Tensor:
    """Return the place of each token in its document of the input, [sequences, length], int64; of padding 0."""
    place = torch.arange(batch.ids.shape[1], dtype=torch.int64, device="cpu").expand_as(batch.ids)
    begins = torch.zeros_like(batch.keep)
    begins[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    return (place - start) * batch.attention


def first_tokens(batches: list[TokenBatch], n: int) -> list[TokenBatch]:
    """Return the batches of a block with only the first `n` of their kept tokens kept, in reading order.

    Batches of which nothing is left are left out; the others are padded as before, so that what is kept keeps its bits.
    """
    counts = torch.zeros(sum(len(batch.order) for batch in batches), dtype=torch.int64, device="cpu")
    for batch in batches:
        counts[batch.order] = batch.keep.sum(1)
    before = counts.cumsum(0) - counts
    cut = [
        replace(batch, keep=batch.keep & (batch.keep.cumsum(1) <= (n - before[batch.order])[:, None]))
        for batch in batches
    ]
    return [batch for batch in cut if bool(batch.keep.any())]

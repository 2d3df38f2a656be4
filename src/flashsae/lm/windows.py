"""From documents to model inputs: token windows with their special tokens, batched by length and padded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DataError
from flashsae.lm.loading import special_ids
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block, Content

_PROBE = "A short sentence to look at."


@dataclass(frozen=True)
class _Window:
    """One model input: the document it comes from and its token ids, special ones included."""

    document: int
    ids: list[int]


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


class Windows:
    """Cut documents into model inputs the way the tokenizer wants them, and batch these.

    Args:
        tokenizer: of the model, from transformers.
        config: how long windows and batches are, how windows begin, and which of their tokens become rows of
            activations. Filled.
        vocabulary: how many ids the model knows, if it says so.
    Raises:
        ConfigError: the special tokens leave no room in a window, no token is left to be kept, there is no BOS token
            to prepend, or the tokenizer is none that text can be cut for.
    """

    def __init__(self, tokenizer: Any, config: ReadingConfig, vocabulary: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._special = special_ids(tokenizer)
        left_out = {*config.exclude_ids, *(self._special if config.mask_special else ())}
        self._left_out = torch.tensor(sorted(left_out), dtype=torch.int64, device="cpu")
        self._vocabulary = vocabulary
        pad = tokenizer.pad_token_id or 0
        self._pad = (
            pad if vocabulary is None or pad < vocabulary else 0
        )  # some add a padding token to the tokenizer alone
        self._prefix, self._suffix = self._added()
        self._set_bos(config.prepend_bos)
        self._content = config.context_length - len(self._prefix) - len(self._suffix)
        self._check(config.context_length)

    def _check(self, context_length: int) -> None:
        """Raise ConfigError where the settings leave no token."""
        if self._content < 1:
            raise ConfigError(
                f"context_length: expected more than the {context_length - self._content} special tokens that the "
                f"tokenizer adds to an input, got {context_length}."
            )
        end = context_length - (len(self._suffix) if self._config.mask_special else 0)
        if self._config.skip_first >= end:
            raise ConfigError(
                f"skip_first: expected fewer than {end}, the tokens of an input without special ones at its end, got "
                f"{self._config.skip_first}."
            )
        unknown = [token for token in self._config.exclude_ids if not 0 <= token < len(self._tokenizer)]
        if unknown:
            raise ConfigError(
                f"exclude_ids: the tokenizer has the ids 0 to {len(self._tokenizer) - 1}, got {unknown[0]}."
            )

    def _set_bos(self, prepend_bos: bool | None) -> None:
        bos = self._tokenizer.bos_token_id
        if prepend_bos and bos is None:
            raise ConfigError("prepend_bos: the tokenizer of this model has no BOS token; leave the setting out.")
        if prepend_bos and bos not in self._prefix:
            self._prefix = [bos, *self._prefix]
        elif prepend_bos is False:
            self._prefix = [token for token in self._prefix if token != bos]

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _added(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer puts around a text; the ways to ask it differ between versions."""
        bare, full = self._encode([_PROBE], special=False)[0], self._encode([_PROBE], special=True)[0]
        if not bare:
            raise ConfigError("model: its tokenizer makes no token of English text; FlashSAE cannot read with it.")
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ConfigError("model: its tokenizer changes a text when it adds special tokens; FlashSAE cannot cut it.")

    def probe(self) -> TokenBatch:
        """Return two windows of full length to learn shapes and limits from, of the same tokens in another order."""
        bare = self._encode([_PROBE], special=False)[0]
        content = (bare * (self._content // len(bare) + 1))[: self._content]
        windows = [_Window(0, self._prefix + ids + self._suffix) for ids in (content, content[1:] + content[:1])]
        return self._batch(windows, [0, 1])

    def batches(self, block: Block) -> list[TokenBatch]:
        """Batch the windows of a block of (number, document) by length, in an order that has nothing to do with it.

        Rows of a batch stand in reading order.
        """
        encoded = self._encode([_text(content) for _, content in block], special=False) if block else []
        for (number, _), ids in zip(block, encoded, strict=True):
            self._check_known(number, ids)
        windows = [w for (number, _), ids in zip(block, encoded, strict=True) for w in self._windows(number, ids)]
        by_length = sorted(range(len(windows)), key=lambda place: -len(windows[place].ids))
        batches = []
        while by_length:
            n_fit = self._config.forward_tokens // len(windows[by_length[0]].ids)
            places = sorted(by_length[:n_fit])
            batches.append(self._batch([windows[place] for place in places], places))
            del by_length[:n_fit]
        # whoever stops in the middle of a block has read windows of all lengths
        generator = torch.Generator().manual_seed(block[0][0] if block else 0)
        return [
            batches[i]
            for i in torch.randperm(len(batches), generator=generator, dtype=torch.int64, device="cpu").tolist()
        ]

    def _check_known(self, document: int, ids: list[int]) -> None:
        """Raise DataError for an id that the model has no embedding of; on a GPU it would end the process."""
        largest = max(ids, default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"document {document} has the token {largest} ({token!r}), and the model knows the ids 0 to "
                f"{self._vocabulary - 1}. Use the tokenizer that belongs to the model."
            )

    def _windows(self, document: int, ids: list[int]) -> list[_Window]:
        ids = self._without_added(ids)
        return [
            _Window(document, self._prefix + ids[start : start + self._content] + self._suffix)
            for start in range(0, len(ids), self._content)
        ]

    def _without_added(self, ids: list[int]) -> list[int]:
        """Return the ids of a text without the special tokens at its ends that are added anyway: none comes twice."""
        start, stop = 0, len(ids)
        while start < stop and ids[start] in self._special and ids[start] in self._prefix:
            start += 1
        while start < stop and ids[stop - 1] in self._special and ids[stop - 1] in self._suffix:
            stop -= 1
        return ids[start:stop]

    def _batch(self, windows: list[_Window], places: list[int]) -> TokenBatch:
        lengths = torch.tensor([len(window.ids) for window in windows], dtype=torch.int64, device="cpu")
        position = torch.arange(int(lengths.max()), dtype=torch.int64, device="cpu")
        attention = position < lengths[:, None]
        ids = torch.full(attention.shape, self._pad, dtype=torch.int64, device="cpu")
        ids[attention] = torch.tensor(
            [token for window in windows for token in window.ids], dtype=torch.int64, device="cpu"
        )
        keep = attention & (position >= self._config.skip_first) & ~torch.isin(ids, self._left_out)
        if self._config.mask_special:
            keep = keep & (position >= len(self._prefix)) & (position < lengths[:, None] - len(self._suffix))
        documents = torch.tensor([window.document for window in windows], dtype=torch.int64, device="cpu")[
            :, None
        ].expand_as(ids)
        return TokenBatch(ids, attention.long(), keep, documents, torch.tensor(places, dtype=torch.int64, device="cpu"))


def _text(content: Content) -> str:
    if not isinstance(content, str):
        raise DataError(f"expected documents of text, got {type(content).__name__}.")
    return content


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

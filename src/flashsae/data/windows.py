"""From documents to model inputs: token windows with their special tokens, batched by length and padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashsae.errors import ConfigError

Block: TypeAlias = list[tuple[int, str]]
"""Documents with their numbers."""

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
    """

    ids: Tensor
    attention: Tensor
    keep: Tensor
    documents: Tensor


class Windows:
    """Cut documents into model inputs the way the tokenizer wants them, and batch these.

    Args:
        tokenizer: of the model, from transformers.
        context_length: tokens in one window, special tokens included.
        batch_tokens: tokens in one batch, padding included.
        mask_special: keep no row of the tokens that the tokenizer adds, nor of its special tokens elsewhere.
    Raises:
        ConfigError: the special tokens leave no room in a window, or the tokenizer is none that text can be cut for.
    """

    def __init__(self, tokenizer: Any, *, context_length: int, batch_tokens: int, mask_special: bool) -> None:
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._mask_special = mask_special
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
        self._pad = tokenizer.pad_token_id or 0
        self._prefix, self._suffix = self._added()
        self._content = context_length - len(self._prefix) - len(self._suffix)
        if self._content < 1:
            raise ConfigError(
                f"context_length: expected more than the {context_length - self._content} special tokens that the "
                f"tokenizer adds to an input, got {context_length}."
            )

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _added(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer puts around a text; the ways to ask it differ between versions."""
        bare, full = self._encode([_PROBE], special=False)[0], self._encode([_PROBE], special=True)[0]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ConfigError("model: its tokenizer changes a text when it adds special tokens; FlashSAE cannot cut it.")

    def probe(self) -> TokenBatch:
        """Return a small input to learn shapes from."""
        return self._batch([self._windows(0, self._encode([_PROBE], special=False)[0])[0]])

    def batches(self, block: Block) -> list[TokenBatch]:
        """Batch the windows of a block of (number, document), the longest first."""
        encoded = self._encode([text for _, text in block], special=False) if block else []
        windows = [w for (number, _), ids in zip(block, encoded, strict=True) for w in self._windows(number, ids)]
        windows.sort(key=lambda window: -len(window.ids))  # stable: equal lengths stay in reading order
        batches = []
        while windows:
            n_fit = self._batch_tokens // len(windows[0].ids)
            batches.append(self._batch(windows[:n_fit]))
            del windows[:n_fit]
        return batches

    def _windows(self, document: int, ids: list[int]) -> list[_Window]:
        return [
            _Window(document, self._prefix + ids[start : start + self._content] + self._suffix)
            for start in range(0, len(ids), self._content)
        ]

    def _batch(self, windows: list[_Window]) -> TokenBatch:
        lengths = torch.tensor([len(window.ids) for window in windows])
        position = torch.arange(int(lengths.max()))
        attention = position < lengths[:, None]
        ids = torch.full(attention.shape, self._pad)
        ids[attention] = torch.tensor([token for window in windows for token in window.ids])
        keep = attention
        if self._mask_special:
            inside = (position >= len(self._prefix)) & (position < lengths[:, None] - len(self._suffix))
            keep = inside & ~torch.isin(ids, self._special)
        documents = torch.tensor([window.document for window in windows])[:, None].expand_as(ids)
        return TokenBatch(ids, attention.long(), keep, documents)

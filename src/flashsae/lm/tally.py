"""What becomes of the tokens of documents on their way into a model, counted and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashsae.lm.framing import Framing

REASONS = ("special tokens", "overlap", "masked", "skip_first", "exclude_ids")
"""Why a token that the model reads makes no row; the first that holds."""


@dataclass(frozen=True)
class Tally:
    """Tokens of some inputs of a model.

    Args:
        documents: that they come from.
        tokens: that the model reads, special ones included.
        left_out: how many of these make no row, by each of the REASONS.
        padding: places in its forwards that hold no token.
    """

    documents: int
    tokens: int
    left_out: Mapping[str, int]
    padding: int

    def __str__(self) -> str:
        """Say which share of what is read makes no row, and why."""
        total = sum(self.left_out.values())
        shares = [f"{reason} {_share(n, self.tokens)}" for reason, n in self.left_out.items() if n]
        no_row = f"{_share(total, self.tokens)} are left out: {', '.join(shares)}" if shares else "none is left out"
        padding = _share(self.padding, self.padding + self.tokens)
        seen = f"by the first {self.documents:,} documents" if self.documents > 1 else "by the first document"
        return f"of the tokens read {no_row}; {padding} of the forwards is padding ({seen})"


def _share(n: int, of: int) -> str:
    share = n / of if of else 0.0
    return f"{share:.1%}" if share >= 0.0005 or not n else "less than 0.1%"


def inputs_in_words(settings: Mapping[str, Any], framing: Framing | None = None, tokenizer: Any = None) -> str:
    """Say what the inputs of a model are.

    Args:
        settings: as `ReadingConfig.of_tokens` tells them.
        framing: what stands around text.
        tokenizer: that knows its tokens by name; needed beside `framing`.
    """
    told = [f"{settings['context_length']:,} tokens", _standing(settings)]
    if settings.get("overlap"):
        told.append(f"the last {settings['overlap']:,} again where a document goes on")
    if settings.get("assistant_only"):
        told.append("rows of the assistant's words alone")
    if framing is not None:
        told += _around(framing, tokenizer, is_packed=bool(settings.get("pack")))
    return ", ".join(told)


def _standing(settings: Mapping[str, Any]) -> str:
    if not settings.get("pack"):
        return "documents apart"
    return "documents packed, each as if it stood alone" if settings.get("pack_apart") else "documents packed"


def _around(framing: Framing, tokenizer: Any, *, is_packed: bool) -> list[str]:
    def named(ids: tuple[int, ...]) -> str:
        return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))

    told = []
    if framing.first:
        told.append(f"{named(framing.first)} at each{' document alone' if framing.later != framing.first else ''}")
    if framing.suffix:
        told.append(f"{named(framing.suffix)} behind each")
    if is_packed:
        between = (*framing.closing, *framing.opening)
        told.append(f"{named(between) or 'nothing'} between documents")
    return told or ["no special token around them"]
